"""The Replica process: an engine, its bank of versions and its part in rollouts, behind Serve.

Serve makes it ready when `__init__` returns, which is when it holds the committed version.
"""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from service import metrics
from service.build import require_build
from service.errors import ConfigurationError, ErrataError, Unavailable, VersionUnavailable
from service.inference import Chunk, Completion, CompletionRequest
from service.replica.bank import VersionBank
from service.replica.client import Refused
from service.replica.engine import Engine
from service.replica.fetching import Fetcher
from service.replica.local import LocalInference
from service.replica.measured import MeasuredSource
from service.replica.membership import Fenced, Membership
from service.routing import RESIDENT, VersionRouter
from service.settings import Settings
from service.store.database import Database
from workers.imports import leave_out_unused

log = logging.getLogger(__name__)

QUERIES = 256
"""In flight on one replica at most; more wait for the first one that has room."""
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 10.0
"""A process that does not answer three times in a row is replaced: what is on a node that was cut
off, if Ray has not given the node up before."""
DRAIN_S = 30.0
"""A replica that is ended answers what it was given for so long at most."""
ROUTING_S = 0.5
"""How often a replica tells the routers what it holds."""
SCALE_UP_S = 5.0
"""With too many queries for so long, a replica is added; the first one at once."""

Load = Callable[[Settings, str], Engine]


class Replica:
    """Answers each query with the version it was admitted for; asked through `ServeInference`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, database_url: str, base_fingerprint: str, build: str, load: Load
    ) -> None:
        """`build` is that of who deployed it; `load` gives the engine of the base model; blocks."""
        require_build(build, ray.util.get_node_ip_address())
        self._id = serve.get_replica_context().replica_id.unique_id
        self._engine = await asyncio.to_thread(load, settings, base_fingerprint)
        self._bank = _bank(settings, self._engine, base_fingerprint)
        self._inference = LocalInference(self._engine, self._bank)
        self._database = Database(database_url, pool_size=2)
        self._membership = Membership(
            self._id,
            self._database,
            self._bank,
            settings.heartbeat_s,
            ray.get_runtime_context().get_session_name(),
        )
        await self._membership.join()
        self._running = asyncio.create_task(self._membership.run())
        self._running.add_done_callback(_count_fence)

    async def complete(
        self, request: CompletionRequest, tried: frozenset[str]
    ) -> AsyncIterator[Completion | ErrataError]:
        """One item. An error on purpose is one: Serve would log it if raised, with its traceback.

        `tried`: ids of the replicas that have refused this request.
        """
        try:
            self._require_serving(request, tried)
            yield await self._inference.complete(request)
        except Unavailable as error:
            yield Refused.by(self._id, error)
        except ErrataError as error:
            yield error

    async def stream(
        self, request: CompletionRequest, tried: frozenset[str]
    ) -> AsyncIterator[Chunk | ErrataError]:
        """As `complete`: an error on purpose is the last item."""
        begun = False
        try:
            self._require_serving(request, tried)
            async with aclosing(self._inference.stream(request)) as chunks:
                async for chunk in chunks:
                    begun = True
                    yield chunk
        except Unavailable as error:
            yield error if begun else Refused.by(self._id, error)
        except ErrataError as error:
            yield error

    def record_routing_stats(self) -> dict[str, Any]:
        """Serve asks for it and tells the routers."""
        metrics.resident(len(self._bank.resident), self._bank.resident_bytes)
        # Sorted: each change is told to every router, and each query changes the bank's order.
        return {RESIDENT: [] if self._running.done() else sorted(self._bank.resident)}

    def check_health(self) -> None:
        """Serve restarts the replica if this raises; a database that is away is no reason."""
        self._engine.check()
        if self._running.done():
            self._running.result()
            raise Unavailable("The replica's background task has ended.")

    async def __del__(self) -> None:
        """Serve calls it once, after the requests in flight have ended."""
        if not hasattr(self, "_running"):
            return  # Ended before it had joined.
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        try:
            await self._membership.leave()
        except Unavailable as error:
            log.warning("not signed off; the lease will run out: %s", error)
        await self._engine.close()
        await self._database.dispose()

    def _require_serving(self, request: CompletionRequest, tried: frozenset[str]) -> None:
        if self._id in tried:
            raise VersionUnavailable("This replica has refused the request before.")
        if self._running.done():
            raise VersionUnavailable(
                f"A replica that was asked for {request.version_id} is being restarted. Try again."
            )


def load_engine(settings: Settings, base_fingerprint: str) -> Engine:
    """Raises `ConfigurationError` if this node's copy of the base model is not the service's."""
    leave_out_unused()
    import torch

    from service.replica.generation import Sizes
    from service.replica.transformers_engine import TransformersEngine
    from workers.models import fingerprint, resolve

    path = resolve(settings.model_path)
    found = fingerprint(path)
    if found != base_fingerprint:
        raise ConfigurationError(
            f"model: {path} has fingerprint {found} on this node, the service runs "
            f"{base_fingerprint}; give every node the same files"
        )
    if settings.replica_gpus and not torch.cuda.is_available():
        raise ConfigurationError(
            f"replica_gpus: {settings.replica_gpus:g} is reserved, but torch {torch.__version__} "
            "finds no GPU here; use the CUDA image on nodes with a driver, or set "
            "ERRATA_REPLICA_GPUS=0 to compute on CPUs"
        )
    engine = TransformersEngine.load(
        path, Sizes(kv_tokens=settings.kv_tokens), threads=settings.replica_threads
    )
    # A generation loop collects garbage when it stops; over all of torch that halts the others.
    gc.collect()
    gc.freeze()
    return engine


def replicas(
    settings: Settings,
    database_url: str,
    base_fingerprint: str,
    build: str,
    load: Load = load_engine,
) -> serve.Application:
    """The replicas, a fixed number or, where the settings give a range, autoscaled by Serve.

    One that is of another `build` (see `source_digest`) refuses to start.
    """
    least, most = settings.replica_range
    scale: dict[str, Any] = {"num_replicas": settings.replicas}
    if least < most:
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least,
                initial_replicas=settings.replicas,
                max_replicas=most,
                target_ongoing_requests=settings.replica_queries,
                upscale_delay_s=SCALE_UP_S,
                downscale_delay_s=settings.scale_down_after_s,
            )
        }
    deployment = serve.deployment(Replica, name="Replica").options(
        **scale,
        max_ongoing_requests=QUERIES,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        request_router_config=RequestRouterConfig(
            request_router_class=VersionRouter, request_routing_stats_period_s=ROUTING_S
        ),
    )
    return deployment.bind(settings, database_url, base_fingerprint, build, load)


def _bank(settings: Settings, engine: Engine, base_fingerprint: str) -> VersionBank:
    fetcher = Fetcher(
        settings.version_store_url,
        base_fingerprint,
        settings.data_dir.resolve() / "cache",
        cache_bytes=settings.version_cache_bytes,
        timeout_s=settings.fetch_timeout_s,
        attempts=settings.fetch_attempts,
    )
    return VersionBank(
        engine,
        MeasuredSource(fetcher),
        base_fingerprint,
        capacity=settings.resident_versions,
        capacity_bytes=settings.resident_bytes,
    )


def _count_fence(task: "asyncio.Task[None]") -> None:
    error = None if task.cancelled() else task.exception()
    if isinstance(error, BaseExceptionGroup) and error.subgroup(Fenced):
        metrics.fenced()
