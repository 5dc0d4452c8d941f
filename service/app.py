"""`build_app`: the only wiring. Which deployments there are, and what each is given.

`application` is what a Serve config names: the same, from settings in the environment.
"""

import asyncio
import gc
import os
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from service import preflight
from service.api.app import create_api
from service.build import source_digest
from service.coordinator.deployment import Coordinator
from service.coordinator.pipeline import BaseModel
from service.errors import ConfigurationError
from service.metrics import exporters
from service.replica.client import ServeInference
from service.replica.deployment import HEALTH_PERIOD_S, HEALTH_TIMEOUT_S, replicas
from service.replica.running import http_host, running_replicas
from service.routing import ApiRouter
from service.settings import Settings, problems
from service.store import versions
from service.store.database import Database
from service.store.migrate import upgrade
from workers import models
from workers.contract import ProgressSink, TrainRequest, TrainResult
from workers.errors import WorkersError
from workers.formats import ChatTokenizer
from workers.imports import leave_out_unused

APP_NAME = "errata"


class Api:
    """The HTTP front end as a Serve deployment; stateless."""

    def __init__(
        self,
        settings: Settings,
        database_url: str,
        replica: DeploymentHandle,
        coordinator: DeploymentHandle,
    ) -> None:
        self._settings = settings
        self._database_url = database_url
        self._inference = ServeInference(replica)
        # Held so that the coordinator is part of the application; they meet at the store only.
        self._coordinator = coordinator

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = create_api(self._settings, Database(self._database_url), self._inference, exporters)
        freeze()
        return api


class CoordinatorProcess(Coordinator):
    """The coordinator as a Serve deployment, given the replicas and the Ray Train driver.

    What brings torch is imported for its first job: it begins to lead seconds earlier.
    """

    def __init__(
        self, settings: Settings, database_url: str, base: BaseModel, replica: DeploymentHandle
    ) -> None:
        freeze()
        super().__init__(
            settings,
            database_url,
            base,
            partial(tokenizer, base.path),
            ServeInference(replica),
            partial(running_replicas, replica),
            train,
            ray.get_runtime_context().get_session_name(),
        )


def train(request: TrainRequest, sink: ProgressSink) -> TrainResult:
    """See `workers.job.train`."""
    from workers import job

    freeze()
    return job.train(request, sink)


@cache
def tokenizer(path: str) -> ChatTokenizer:
    """That of the model there."""
    leave_out_unused()
    from transformers import AutoTokenizer

    loaded: ChatTokenizer = AutoTokenizer.from_pretrained(path)
    freeze()
    return loaded


def freeze() -> None:
    """What was imported stays: to look through all of it for garbage would halt the process."""
    gc.collect()
    gc.freeze()


def build_app(settings: Settings, database_url: str, base: BaseModel) -> serve.Application:
    """The Serve application: Api, Coordinator and Replica over one PostgreSQL."""
    light = {"num_cpus": settings.api_cpus}
    # Where Ray Train looks for its cluster to clean up after a killed run: a node may have several.
    # Nodes that are told know best: a head that is started again may have another address.
    told = "RAY_ADDRESS" in os.environ
    cluster = {} if told else {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    coordinator = serve.deployment(CoordinatorProcess, name="Coordinator").options(
        num_replicas=1,
        ray_actor_options={**light, "runtime_env": {"env_vars": cluster}},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
    )
    api = serve.deployment(serve.ingress()(Api), name="Api").options(
        num_replicas=settings.api_replicas,
        max_ongoing_requests=1024,
        ray_actor_options=light,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        request_router_config=RequestRouterConfig(request_router_class=ApiRouter),
    )
    inference = replicas(settings, database_url, base.fingerprint, source_digest())
    return api.bind(
        settings,
        database_url,
        inference,
        coordinator.bind(settings, database_url, base, inference),
    )


def application(args: Mapping[str, Any]) -> serve.Application:
    """The service on the Ray cluster that Serve runs on; what `deploy/serve/serve.yaml` names.

    Settings are those of the environment, but for `args`, by name. Raises `RayServeException` if
    something that it needs is not there: Serve shows its text as the application's status, and
    does not try again, as it does for other exceptions.
    """
    try:
        return _application(args)
    except (ConfigurationError, WorkersError) as error:
        raise RayServeException(str(error)) from error


def _application(args: Mapping[str, Any]) -> serve.Application:
    settings = settings_from(args)
    preflight.check_host(http_host(), settings.behind_proxy)
    preflight.require(settings)
    assert settings.database_url is not None
    base = base_model(settings)
    upgrade(settings.database_url)
    asyncio.run(ensure_base(settings.database_url, base.fingerprint))
    return build_app(settings, settings.database_url, base)


def settings_from(args: Mapping[str, Any]) -> Settings:
    """The environment's settings, but for `args`; `ConfigurationError` for one that is unfit."""
    if unknown := sorted(args.keys() - Settings.model_fields.keys()):
        raise ConfigurationError(
            f"args: {', '.join(unknown)} is no setting; the settings are "
            f"{', '.join(Settings.model_fields)}"
        )
    try:
        return Settings().replace(**args)
    except ValidationError as error:
        raise ConfigurationError(problems(error)) from None


def base_model(settings: Settings) -> BaseModel:
    """Reads all of its weights. Raises `UnsupportedModel` if it cannot be edited."""
    path = models.resolve(settings.model_path)
    return BaseModel(str(path), models.check(path), models.fingerprint(path))


async def ensure_base(database_url: str, fingerprint: str) -> None:
    """Raises `ConfigurationError` if the database belongs to another base model."""
    store = Database(database_url)
    try:
        async with store.transaction() as conn:
            await versions.ensure_base(conn, fingerprint)
    finally:
        await store.dispose()
