"""Which versions a replica holds: staged on demand, bounded, least recently used goes first.

Owns residency. Knows the engine by its protocol and versions by the artifact store, nothing of Ray
or SQL. Used from one event loop; reading and staging run on a worker thread.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from service.errors import NotFound, Unavailable, VersionRejected
from service.replica.engine import Engine
from service.versions import BASE_VERSION
from workers.errors import ArtifactError, ManifestMissing


class VersionBank:
    """The base, always, and at most `capacity` other versions.

    Pinned versions and versions with requests in flight are never dropped; a pinned version is
    taken in even if that exceeds the capacity, until requests of others end.
    """

    def __init__(
        self, engine: Engine, store_url: str, base_fingerprint: str, capacity: int
    ) -> None:
        self._engine = engine
        self._store_url = store_url
        self._base_fingerprint = base_fingerprint
        self._capacity = capacity
        self._pinned = frozenset({BASE_VERSION})
        self._digests = OrderedDict({BASE_VERSION: base_fingerprint})
        """Of the versions in memory, least recently used first."""
        self._claims: Counter[str] = Counter()
        """How many requests wait for or run on each version."""
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._reserved: set[str] = set()
        """Versions being loaded that have been given a place."""

    @property
    def resident(self) -> tuple[str, ...]:
        """Ids of the versions in memory, least recently used first."""
        return tuple(self._digests)

    def in_flight(self, version_id: str) -> int:
        """How many requests wait for a version or run on it."""
        return self._claims[version_id]

    async def pin(self, version_ids: Iterable[str]) -> None:
        """Keep these, and no longer the ones pinned before; none needs to be resident yet."""
        self._pinned = frozenset({BASE_VERSION, *version_ids})
        await self._trim()

    async def ensure(self, version_id: str) -> str:
        """Make a version resident and return the digest of what was loaded (v0: its fingerprint).

        Raises `NotFound` if it was never published, `VersionRejected` if it fails verification,
        `Unavailable` if the store cannot be read or every place is taken by requests in flight.
        """
        async with self.use(version_id):
            return self._digests[version_id]

    @asynccontextmanager
    async def use(self, version_id: str) -> AsyncIterator[None]:
        """Make a version resident and keep it so while a request runs; raises as `ensure`."""
        self._claims[version_id] += 1
        try:
            while version_id not in self._digests:
                # Shielded: others may wait for the same version when this request is given up.
                await asyncio.shield(self._loaded(version_id))
            self._digests.move_to_end(version_id)
            yield
        finally:
            self._claims[version_id] -= 1
            await self._trim()

    def _loaded(self, version_id: str) -> "asyncio.Task[None]":
        if version_id not in self._loading:
            task = asyncio.create_task(self._load(version_id))
            self._loading[version_id] = task
            task.add_done_callback(lambda _: self._loading.pop(version_id))
            task.add_done_callback(_retrieve)
        return self._loading[version_id]

    async def _load(self, version_id: str) -> None:
        self._reserved.add(version_id)
        try:
            await self._trim()
            if self._excess() > 0 and version_id not in self._pinned:
                raise Unavailable(
                    f"Version {version_id} cannot be staged now: all {self._capacity} places hold "
                    "versions that are pinned or have requests in flight. Try again."
                )
            digest = await asyncio.to_thread(self._stage, version_id)
            self._digests[version_id] = digest
        finally:
            self._reserved.remove(version_id)

    def _stage(self, version_id: str) -> str:
        # Imported here: it brings torch, which those who only import the deployment do not need.
        from workers.artifact import read_manifest, read_tensors

        try:
            manifest = read_manifest(self._store_url, version_id, self._base_fingerprint)
            self._engine.stage(version_id, read_tensors(self._store_url, manifest))
        except ManifestMissing as error:
            raise NotFound(f"Version {version_id} was never published: {error}") from error
        except ArtifactError as error:
            raise VersionRejected(f"Version {version_id} failed verification: {error}") from error
        except OSError as error:
            raise Unavailable(
                f"Version {version_id} cannot be read from the version store now: {error}"
            ) from error
        return manifest.digest

    async def _trim(self) -> None:
        """While there are too many, drop what nobody needs now, least recently used first."""
        for version_id in self.resident:
            if self._excess() <= 0:
                return
            needed = version_id in self._pinned or self._claims[version_id]
            if version_id in self._digests and not needed:
                del self._digests[version_id]
                await self._engine.drop(version_id)

    def _excess(self) -> int:
        return len(self._digests) - 1 + len(self._reserved) - self._capacity


def _retrieve(task: "asyncio.Task[None]") -> None:
    """Those who waited got the error; if nobody is left, it needs no other report."""
    if not task.cancelled():
        task.exception()
