"""Two clusters over one PostgreSQL, of which one leads: faults at random, while clients edit.

What came of it is in the database (`audit`) and in samples of the server's locks. Each cluster, or
each life of one, names itself there: the `application_name` of its connections.
"""

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Protocol, TypeVar

import psycopg

from service.edits import EditState
from service.jobs import JobState
from service.store import edits, jobs, serving
from service.store.database import Database
from tests.faults.audit import HOLDERS, Audit, check_generations, check_job
from tests.faults.invariants import Invariants

CLUSTERS = ("blue", "green")
SAMPLE_S = 0.02
SETTLE_S = 240.0
OF_THE_LEADER = 0.75
SETTLED = {EditState.APPLIED, EditState.FAILED, EditState.SUPERSEDED}


class Rival(Protocol):
    name: str
    """What it tells the database that it is called."""


R = TypeVar("R", bound=Rival)


@dataclass
class Figures:
    """What happened."""

    faults: dict[str, int]
    seconds: float = 0.0
    samples: int = 0
    most_leaders: int = 0
    """By the server's locks, in any sample."""
    leaders: set[str] = field(default_factory=set)
    leaderships: int = 0
    """How often, in those samples, it was another that led."""
    acknowledged: int = 0
    generation: int = 0
    jobs_done: int = 0
    failures: list[str] = field(default_factory=list)
    """Of jobs, in the service's words."""
    takings: int = 0
    """How often a leader took a job, from the one before or as the first."""
    changes: int = 0
    unled_changes: int = 0
    """By a leader that had lost its lock; each legal, as all are."""


class Rivals(ABC, Generic[R]):
    """The run: `run` makes it, and `check` tells whether all was as it must be."""

    faults: ClassVar[Mapping[str, int]]
    """What may happen to a rival, and how often as compared to the rest.

    `_NAME` does it; false: there was nothing that it could happen to.
    """
    pause_s: ClassVar[tuple[float, float]]
    """Between two faults, at least and at most."""

    figures: Figures

    def __init__(self, url: str, seed: int) -> None:
        self._url = url
        self._random = random.Random(seed)
        self._database = Database(url)
        self._audit = Audit(url)
        self._invariants = Invariants(url)
        self._leader: str | None = None
        self._recoveries: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float) -> None:
        """Faults for so long; then both run, until every edit is settled."""
        async with self._running(), self.beside(self._sample):
            began = time.monotonic()
            async with self.beside(self._edit):
                while time.monotonic() - began < seconds:
                    await asyncio.sleep(self._random.uniform(*self.pause_s))
                    await self._fault()
                    self._invariants.check()
            await asyncio.gather(*self._recoveries)
            await self._settle()
            self.figures.seconds = time.monotonic() - began
        await self._count()
        await self._database.dispose()

    def check(self) -> None:
        """The server let one lead at a time, and what they did was what one would have done."""
        assert self.figures.most_leaders == 1
        commits = self._audit.commits()
        check_generations(commits)
        for mine in self._audit.jobs().values():
            check_job(mine)
        assert self.figures.generation == len(commits) + 1
        self._invariants.check_at_rest()

    @abstractmethod
    def _running(self) -> AbstractAsyncContextManager[None]:
        """Both, until the end of the block."""

    @abstractmethod
    def _able(self) -> Sequence[R]:
        """Those that something may happen to now."""

    @abstractmethod
    def _check_alive(self) -> None:
        """Raises if one has ended by itself."""

    @abstractmethod
    async def _edit(self) -> None:
        """Clients that edit, without an end; what was acknowledged goes to `_invariants`."""

    @asynccontextmanager
    async def beside(self, work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """For as long as the block lasts; its failure is the run's, at the end of the block."""
        task = asyncio.ensure_future(work())
        try:
            yield
        finally:
            task.cancel()
            [error] = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(error, asyncio.CancelledError):
            raise AssertionError("work beside the faults ended") from error

    async def _sample(self) -> None:
        """Who leads, by the server's locks."""
        async with await psycopg.AsyncConnection.connect(self._url, autocommit=True) as conn:
            while True:
                holders = [name for (name,) in await (await conn.execute(HOLDERS)).fetchall()]
                self.figures.samples += 1
                self.figures.most_leaders = max(self.figures.most_leaders, len(holders))
                self._lead(holders[0] if holders else None)
                await asyncio.sleep(SAMPLE_S)

    def _lead(self, leader: str | None) -> None:
        if leader is not None and leader != self._leader:
            self.figures.leaders.add(leader)
            self.figures.leaderships += 1
        self._leader = leader

    async def _fault(self) -> None:
        self._check_alive()
        [kind] = self._random.choices([*self.faults], [*self.faults.values()])
        if able := self._able():
            leading = [rival for rival in able if rival.name == self._leader]
            of_the_leader = leading and self._random.random() < OF_THE_LEADER
            victim = self._random.choice(leading if of_the_leader else able)
            if await getattr(self, f"_{kind}")(victim) is not False:
                self.figures.faults[kind] += 1

    def later(self, seconds: float, what: Callable[[], Awaitable[None]]) -> None:
        """At the latest when the faults are over, and before the run ends."""

        async def wait() -> None:
            await asyncio.sleep(seconds)
            await what()

        self._recoveries.add(asyncio.create_task(wait()))

    async def end_recoveries(self) -> None:
        """For a run that ends early."""
        for task in self._recoveries:
            task.cancel()
        await asyncio.gather(*self._recoveries, return_exceptions=True)

    async def _settle(self) -> None:
        async with asyncio.timeout(SETTLE_S):
            while not await self._settled():
                self._check_alive()
                await asyncio.sleep(0.2)

    async def _settled(self) -> bool:
        async with self._database.transaction() as conn:
            waiting = [await edits.count(conn, state) for state in set(EditState) - SETTLED]
            return not any(waiting) and await jobs.next_unfinished(conn) is None

    async def _count(self) -> None:
        figures = self.figures
        async with self._database.transaction() as conn:
            figures.generation = (await serving.current(conn)).generation
            done, _ = await jobs.page(conn, state=JobState.DONE, limit=100_000)
            failed, _ = await jobs.page(conn, state=JobState.FAILED, limit=100_000)
        figures.jobs_done, figures.failures = len(done), [str(job.error) for job in failed]
        figures.acknowledged = len(self._invariants.acknowledged)
        taken = [
            {change.trainer for change in mine} - {None} for mine in self._audit.jobs().values()
        ]
        figures.takings = sum(map(len, taken))
        changes = [change for mine in self._audit.jobs().values() for change in mine]
        figures.changes = len(changes)
        figures.unled_changes = sum(change.by != change.leader for change in changes)
