"""Which versions a replica holds: staged on demand, bounded, least recently used goes first.

Owns residency. Knows the engine by its protocol and versions by where they come from, nothing of
Ray or SQL. Used from one event loop; reading and staging run on a worker thread.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from service.errors import VersionUnavailable
from service.replica.engine import Engine
from service.versions import BASE_VERSION

if TYPE_CHECKING:
    from torch import Tensor

    from workers.artifact import Manifest


class Source(Protocol):
    """Where versions come from; both block, and raise as `VersionBank.ensure`."""

    def manifest(self, version_id: str) -> "Manifest": ...

    def tensors(self, manifest: "Manifest") -> "Iterator[tuple[str, Tensor]]": ...


@dataclass(frozen=True)
class Held:
    """A version in memory."""

    digest: str
    """sha256 over the loaded tensors, as the manifest states it; v0: the base's fingerprint."""
    bytes: int
    """Of its own tensors, which the base does not share."""


class VersionBank:
    """The base, always, and others within `capacity` versions and `capacity_bytes` (None: any).

    Pinned versions and versions with requests in flight are never dropped; a pinned version is
    taken in even if that exceeds the bounds, until requests of others end.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        base_fingerprint: str,
        *,
        capacity: int,
        capacity_bytes: int | None = None,
    ) -> None:
        self._engine = engine
        self._source = source
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._pinned = frozenset({BASE_VERSION})
        self._held = OrderedDict({BASE_VERSION: Held(base_fingerprint, 0)})
        """The versions in memory, least recently used first."""
        self._claims: Counter[str] = Counter()
        """How many requests wait for or run on each version."""
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._reserved: dict[str, int] = {}
        """Bytes of the versions being loaded that have been given a place."""

    @property
    def resident(self) -> tuple[str, ...]:
        """Ids of the versions in memory, least recently used first."""
        return tuple(self._held)

    @property
    def resident_bytes(self) -> int:
        """Of the tensors that the versions in memory do not share with the base."""
        return sum(held.bytes for held in self._held.values())

    def digest(self, version_id: str) -> str | None:
        """What `ensure` would return at once; None if the version is not in memory."""
        held = self._held.get(version_id)
        return None if held is None else held.digest

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
        `Unavailable` if the store cannot be read, `VersionUnavailable` if there is no place for it.
        """
        async with self.use(version_id):
            return self._held[version_id].digest

    @asynccontextmanager
    async def use(self, version_id: str) -> AsyncIterator[None]:
        """Make a version resident and keep it so while a request runs; raises as `ensure`."""
        self._claims[version_id] += 1
        try:
            while version_id not in self._held:
                # Shielded: others may wait for the same version when this request is given up.
                await asyncio.shield(self._loaded(version_id))
            self._held.move_to_end(version_id)
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
        manifest = await asyncio.to_thread(self._source.manifest, version_id)
        self._reserved[version_id] = manifest.bytes
        try:
            await self._trim()
            if self._exceeded and version_id not in self._pinned:
                raise VersionUnavailable(self._no_place(version_id, manifest.bytes))
            await asyncio.to_thread(self._stage, manifest)
            self._held[version_id] = Held(manifest.digest, manifest.bytes)
        finally:
            del self._reserved[version_id]

    def _stage(self, manifest: "Manifest") -> None:
        self._engine.stage(manifest.version_id, self._source.tensors(manifest))

    async def _trim(self) -> None:
        """While there is too much, drop what nobody needs now, least recently used first."""
        for version_id in self.resident:
            if not self._exceeded:
                return
            needed = version_id in self._pinned or self._claims[version_id]
            if version_id in self._held and not needed:
                del self._held[version_id]
                await self._engine.drop(version_id)

    @property
    def _exceeded(self) -> bool:
        versions = len(self._held) - 1 + len(self._reserved)
        held_bytes = self.resident_bytes + sum(self._reserved.values())
        too_large = self._capacity_bytes is not None and held_bytes > self._capacity_bytes
        return too_large or versions > self._capacity

    def _no_place(self, version_id: str, size: int) -> str:
        bound = f"{self._capacity} versions"
        if self._capacity_bytes is not None:
            bound += f" of together {self._capacity_bytes:,} bytes"
        return (
            f"Version {version_id} ({size:,} bytes) cannot be staged now: a replica holds {bound}, "
            "and those it has are pinned or have requests in flight. Try again."
        )


def _retrieve(task: "asyncio.Task[None]") -> None:
    """Those who waited got the error; if nobody is left, it needs no other report."""
    if not task.cancelled():
        task.exception()
