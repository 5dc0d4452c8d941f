"""The Replica process: an engine, its bank of versions and its part in rollouts, behind Serve.

Serve makes it ready when `__init__` returns, which is when it holds the committed version.
"""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

from ray import serve

from service.errors import ConfigurationError, ErrataError, Unavailable
from service.inference import Chunk, Completion, CompletionRequest
from service.replica.bank import VersionBank
from service.replica.engine import Engine
from service.replica.local import LocalInference
from service.replica.membership import Membership
from service.settings import Settings
from service.store.database import Database

log = logging.getLogger(__name__)


class Replica:
    """Answers each query with the version it was admitted for; asked through `ServeInference`."""

    async def __init__(self, settings: Settings, database_url: str, base_fingerprint: str) -> None:  # type: ignore[misc]  # Serve awaits it
        """Raises `ConfigurationError` if its copy of the base model is not the service's."""
        self._engine = await asyncio.to_thread(_load_engine, settings, base_fingerprint)
        bank = VersionBank(
            self._engine, settings.version_store_url, base_fingerprint, settings.resident_versions
        )
        self._inference = LocalInference(self._engine, bank)
        self._database = Database(database_url, pool_size=2)
        self._membership = Membership(
            serve.get_replica_context().replica_id.unique_id,
            self._database,
            bank,
            settings.heartbeat_s,
        )
        await self._membership.join()
        self._running = asyncio.create_task(self._membership.run())

    async def complete(self, request: CompletionRequest) -> Completion | ErrataError:
        """An error on purpose is returned: Serve would log each one raised, with its traceback."""
        try:
            return await self._inference.complete(request)
        except ErrataError as error:
            return error

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk | ErrataError]:
        """As `complete`: an error on purpose is the last item."""
        try:
            async with aclosing(self._inference.stream(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ErrataError as error:
            yield error

    def check_health(self) -> None:
        """Serve restarts the replica if this raises; a database that is away is no reason."""
        self._engine.check()
        if self._running.done():
            self._running.result()
            raise Unavailable("The replica's background task has ended.")

    async def __del__(self) -> None:
        """Serve calls it once, after the requests in flight have ended."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        try:
            await self._membership.leave()
        except Unavailable as error:
            log.warning("not signed off; the lease will run out: %s", error)
        await self._engine.close()
        await self._database.dispose()


def _load_engine(settings: Settings, base_fingerprint: str) -> Engine:
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
    engine = TransformersEngine.load(
        path, Sizes(kv_tokens=settings.kv_tokens), threads=settings.replica_threads
    )
    # A generation loop collects garbage when it stops; over all of torch that halts the others.
    gc.collect()
    gc.freeze()
    return engine
