"""Which version answers a query: decided here, once, before any replica sees it.

Follows the committed version by notification and by a poll; while the database is away it goes
on with what it knew last.
"""

import asyncio
import logging
import re
import time
from dataclasses import dataclass

from service.errors import NotFound, Unavailable
from service.store import serving, versions
from service.store.database import Database
from service.versions import BASE_VERSION, Serving, VersionState

POLL_S = 1.0
KNOWN_FOR_S = 5.0
_VERSION = re.compile(r"v(0|[1-9][0-9]{0,8})")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admitted:
    """The version that answers a query, and the serving generation it was chosen in."""

    version_id: str
    generation: int


class Admission:
    """Resolves model names; `start` it in the event loop that uses it, and `stop` it there."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._serving: Serving | None = None
        self._usable: dict[str, float] = {BASE_VERSION: float("inf")}
        """When each version was last seen usable, in seconds of the monotonic clock."""
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Learn what is served, if the database can be reached, and follow it."""
        await self._refresh()
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._follow())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def resolve(self, model: str) -> Admitted:
        """The version for `errata`, `errata@v12` or `errata@base`.

        `NotFound` for another model, and for a version that does not exist or was rejected;
        `Unavailable` before the first contact with the database.
        """
        now = self._serving
        if now is None:
            raise Unavailable("what is served is not known yet; try again soon")
        name, _, wanted = model.partition("@")
        if name != "errata" or (not wanted and model != name):
            raise NotFound(f"no model {model!r}; there are errata, errata@base and errata@vN")
        if not wanted:
            return Admitted(now.version_id, now.generation)
        version_id = BASE_VERSION if wanted == "base" else wanted
        if version_id != now.version_id:
            await self._require_usable(model, version_id)
        return Admitted(version_id, now.generation)

    async def _require_usable(self, model: str, version_id: str) -> None:
        seen_at = self._usable.get(version_id)
        if seen_at is not None and time.monotonic() - seen_at < KNOWN_FOR_S:
            return
        if not _VERSION.fullmatch(version_id):
            raise NotFound(f"no model {model!r}: versions are written as errata@v12")
        try:
            async with self._database.transaction() as conn:
                version = await versions.get(conn, version_id)
        except Unavailable:
            if seen_at is None:
                raise
            return
        if version.state is VersionState.REJECTED:
            self._usable.pop(version_id, None)
            raise NotFound(f"{version_id} was rejected: {version.error}")
        self._usable[version_id] = time.monotonic()

    async def _listen(self) -> None:
        async for _ in self._database.listen(serving.CHANNEL):
            self._changed.set()

    async def _follow(self) -> None:
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._changed.wait()
            except TimeoutError:
                self._changed.set()
            self._changed.clear()
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            async with self._database.transaction() as conn:
                self._serving = await serving.current(conn)
        except Unavailable as error:
            log.warning("serving the last known version: %s", error)
