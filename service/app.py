"""`build_app`: the only wiring. Which deployments there are, and what each is given."""

import gc
from functools import partial

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from service.api.app import create_api
from service.coordinator.deployment import Coordinator
from service.coordinator.pipeline import BaseModel
from service.metrics import exporters
from service.replica.client import ServeInference
from service.replica.deployment import replicas
from service.replica.running import running_replicas
from service.settings import Settings
from service.store.database import Database

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
    """The coordinator as a Serve deployment, given the replicas and the Ray Train driver."""

    def __init__(
        self, settings: Settings, database_url: str, base: BaseModel, replica: DeploymentHandle
    ) -> None:
        # Imported in the process that trains: they bring torch with them.
        from transformers import AutoTokenizer

        from workers.job import train

        tokenizer = AutoTokenizer.from_pretrained(base.path)
        freeze()
        super().__init__(
            settings,
            database_url,
            base,
            tokenizer,
            ServeInference(replica),
            partial(running_replicas, replica),
            train,
        )


def freeze() -> None:
    """What was imported stays: to look through all of it for garbage would halt the process."""
    gc.collect()
    gc.freeze()


def build_app(settings: Settings, database_url: str, base: BaseModel) -> serve.Application:
    """The Serve application: Api, Coordinator and Replica over one PostgreSQL."""
    light = {"num_cpus": 0}
    # Where Ray Train looks for its cluster to clean up after a killed run: a node may have several.
    cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    coordinator = serve.deployment(CoordinatorProcess, name="Coordinator").options(
        num_replicas=1,
        ray_actor_options={**light, "runtime_env": {"env_vars": cluster}},
        health_check_period_s=2,
    )
    api = serve.deployment(serve.ingress()(Api), name="Api").options(
        num_replicas=settings.api_replicas,
        max_ongoing_requests=1024,
        ray_actor_options=light,
    )
    inference = replicas(settings, database_url, base.fingerprint)
    return api.bind(
        settings,
        database_url,
        inference,
        coordinator.bind(settings, database_url, base, inference),
    )
