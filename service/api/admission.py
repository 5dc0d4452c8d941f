"""Which version answers a query: decided here, once, before any replica sees it.

Follows what is committed by notification, which carries it, and by a poll. Once it has heard
nothing for a while it asks before it answers, since a commit may have been missed; if the database
is away it goes on with what it knew last. It never goes back to an earlier generation.
"""

import asyncio
import hashlib
import logging
import random
import re
import time
from dataclasses import dataclass

from service.errors import NotFound, Unavailable
from service.store import serving, versions
from service.store.database import Database
from service.versions import BASE_VERSION, Canary, Committed, VersionState

POLL_S = 1.0
LOST_S = 3.0
"""Without a word from the database for so long, a query asks it first."""
CATCH_UP_S = 4.0
"""And waits so long: more than TCP does between its first attempts to connect (1 s, 2 s)."""
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
        self._committed: Committed | None = None
        self._heard_at = float("-inf")
        """When the database last told what is committed, in seconds of the monotonic clock."""
        self._asking: asyncio.Task[None] | None = None
        self._usable: dict[str, float] = {BASE_VERSION: float("inf")}
        """When each version was last seen usable, in seconds of the monotonic clock."""
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Learn what is served, if the database can be reached, and follow it."""
        await self._refresh()
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._poll())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._asking is not None:
            self._asking.cancel()
        ended = filter(None, (*self._tasks, self._asking))
        await asyncio.gather(*ended, return_exceptions=True)

    @property
    def informed(self) -> bool:
        """Whether it has ever learnt what is served."""
        return self._committed is not None

    async def resolve(
        self, model: str, *, sticky: str | None = None, at_least: int = 0
    ) -> Admitted:
        """The version for `errata`, `errata@v12` or `errata@base`.

        `errata` is the committed version or, for its share of the queries, the canary: queries
        with the same `sticky` key get the same one. `at_least` is a generation that the answer
        must not be older than. `NotFound` for another model, and for a version that does not exist
        or was rejected; `Unavailable` before the first contact with the database, and if the
        generation asked for is not reached.
        """
        now = await self._reached(at_least)
        name, _, wanted = model.partition("@")
        if name != "errata" or (not wanted and model != name):
            raise NotFound(f"no model {model!r}; there are errata, errata@base and errata@vN")
        if not wanted:
            return Admitted(_share(now, sticky), now.generation)
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

    async def _reached(self, generation: int) -> Committed:
        if self._committed is None or self._committed.generation < generation:
            await self._refresh()
        elif time.monotonic() - self._heard_at > LOST_S:
            await asyncio.wait((self._ask(),), timeout=CATCH_UP_S)
        now = self._committed
        if now is None:
            raise Unavailable("what is served is not known yet; try again soon")
        if now.generation < generation:
            raise Unavailable(
                f"generation {generation} was asked for, and {now.generation} is the newest known "
                "here; try again soon"
            )
        return now

    async def _listen(self) -> None:
        async for payload in self._database.listen(serving.CHANNEL):
            self._learn(serving.announced(payload).committed)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.wait((self._ask(),))

    def _ask(self) -> asyncio.Task[None]:
        """One for all that wait for it."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._refresh())
        return self._asking

    async def _refresh(self) -> None:
        try:
            async with self._database.transaction() as conn:
                self._learn((await serving.current(conn)).committed)
        except Unavailable as error:
            log.warning("serving the last known version: %s", error)

    def _learn(self, committed: Committed) -> None:
        self._heard_at = time.monotonic()
        if self._committed is None or committed.generation > self._committed.generation:
            self._committed = committed


def _share(now: Committed, sticky: str | None) -> str:
    """The canary for its percentage of the keys (of the queries that have none), else the live one.

    A key that has the canary keeps it when the percentage grows.
    """
    if now.canary is None:
        return now.version_id
    place = random.random() if sticky is None else _place(now.canary, sticky)
    return now.canary.version_id if 100 * place < now.canary.percent else now.version_id


def _place(canary: Canary, sticky: str) -> float:
    """Of a key, in [0, 1), evenly; another one for another canary."""
    digest = hashlib.sha256(f"{canary.version_id} {sticky}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64
