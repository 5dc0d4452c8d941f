"""Two coordinators over one PostgreSQL, killed, stopped and cut off at random, while clients edit.

Real processes without Ray: what they train is a function, and the one replica is a row. What came
of it is in the database (`audit`), in samples of the server's locks, and in what each process told.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import combinations, count
from pathlib import Path

import psycopg

from service.edits import EditState, NewEdit
from service.jobs import JobState
from service.store import edits, jobs, replicas, serving, versions
from service.store.database import Database
from tests.faults.audit import HOLDERS, LOSE_LOCK, Audit, check_commits, check_job
from tests.faults.candidate import LEADS, REFUSED, TRAINS, prompt
from tests.faults.invariants import Invariants
from tests.faults.lives import Life, nursery

CLUSTERS = ("blue", "green")
SAMPLE_S = 0.02
SETTLE_S = 120.0
NOTICES_S = 8.0
"""A leader that runs knows so soon that it leads no more: it asks each second, and waits for 5."""
FAULTS = {"kill": 4, "stop": 2, "stop_and_cut": 3, "cut": 2}
OF_THE_LEADER = 0.75
SETTLED = {EditState.APPLIED, EditState.FAILED, EditState.SUPERSEDED}


@dataclass
class Figures:
    """What happened."""

    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    samples: int = 0
    most_leaders: int = 0
    """By the server's locks, in any sample."""
    leaderships: int = 0
    acknowledged: int = 0
    generation: int = 0
    jobs_done: int = 0
    jobs_empty: int = 0
    """Those that a leader began when another had just claimed all edits."""
    trainings: int = 0
    trainings_refused: int = 0
    """Those that were told that another trains by now."""
    overlaps: int = 0
    """How often a leader that was cut off had yet to notice when another led already."""
    longest_overlap_s: float = 0.0
    """Of these, while it was awake."""
    changes: int = 0
    unled_changes: int = 0
    """By a leader that had lost its lock; each legal, as all are."""


class TwoClusters:
    """The run: `run` makes it, and `check` tells whether all was as it must be."""

    def __init__(self, url: str, data_dir: Path, seed: int) -> None:
        self._url = url
        self._data_dir = data_dir
        self._random = random.Random(seed)
        self._database = Database(url)
        self._audit = Audit(url)
        self._invariants = Invariants(url)
        self._present: dict[str, Life] = {}
        self._leader: str | None = None
        self._recoveries: set[asyncio.Task[None]] = set()
        self.figures = Figures()

    async def run(self, seconds: float) -> None:
        """Faults for so long; then both run, until every edit is settled."""
        async with self._database.transaction() as conn:
            await versions.ensure_base(conn, "base")
            assert await replicas.join(conn, "a", [])
        async with (
            self._running() as lives,
            self._beside(self._sample),
            self._beside(self._replicate),
        ):
            began = time.monotonic()
            async with self._beside(self._edit):
                while time.monotonic() - began < seconds:
                    await self._fault()
                    self._invariants.check()
            await asyncio.gather(*self._recoveries)
            await self._settle()
            self.figures.seconds = time.monotonic() - began
        await self._count(lives)
        self._compare_beliefs(lives)
        await self._database.dispose()

    def check(self) -> None:
        """The server let one lead at a time; by their own word two did so only until one that was

        cut off had noticed; and what they did was what one would have done.
        """
        assert self.figures.most_leaders == 1
        assert self.figures.longest_overlap_s < NOTICES_S
        commits, changes = self._audit.commits(), self._audit.jobs()
        check_commits(commits)
        for mine in changes.values():
            check_job(mine)
        assert self.figures.generation == len(commits) + 1
        assert self.figures.jobs_done == len(commits)
        self._invariants.check_at_rest()

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[list[Life]]:
        """Both; all lives that there are, ended at the end of the block."""
        async with nursery(self._url, self._data_dir) as self._nursery:
            await asyncio.gather(*map(self._start, CLUSTERS))
            try:
                yield self._nursery.lives
            finally:
                for task in self._recoveries:
                    task.cancel()
                await asyncio.gather(*self._recoveries, return_exceptions=True)

    @asynccontextmanager
    async def _beside(self, work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """For as long as the block lasts; its failure is the run's, at the end of the block."""
        task = asyncio.ensure_future(work())
        try:
            yield
        finally:
            task.cancel()
            [error] = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(error, asyncio.CancelledError):
            raise AssertionError("work beside the faults ended") from error

    async def _start(self, cluster: str) -> None:
        number = len(self._nursery.lives)
        self._present[cluster] = await self._nursery.begin(f"{cluster}-{number}")

    # Beside the faults

    async def _sample(self) -> None:
        """Who leads, by the server's locks."""
        async with await psycopg.AsyncConnection.connect(self._url, autocommit=True) as conn:
            while True:
                holders = [name for (name,) in await (await conn.execute(HOLDERS)).fetchall()]
                self.figures.samples += 1
                self.figures.most_leaders = max(self.figures.most_leaders, len(holders))
                self._leader = holders[0] if holders else None
                await asyncio.sleep(SAMPLE_S)

    async def _edit(self) -> None:
        """New facts, and now and then one that was stated before."""
        for number in count(1):
            again = self._random.randint(max(1, number - 10), number)
            stated = [number] if self._random.random() < 0.8 else [number, again]
            new = [NewEdit(prompt(one), f"target {one}") for one in dict.fromkeys(stated)]
            async with self._database.transaction() as conn:
                stored = await edits.add(conn, new)
            self._invariants.acknowledged.update(edit.id for edit in stored)
            await asyncio.sleep(self._random.uniform(0.05, 0.4))

    async def _replicate(self) -> None:
        """As a replica that loads whatever is staged."""
        held: set[str] = set()
        while True:
            async with self._database.transaction() as conn:
                staging_id = (await serving.current(conn)).staging_id
                await replicas.heartbeat(conn, "a", sorted(held))
                if staging_id is not None and staging_id not in held:
                    await replicas.acknowledge(conn, "a", staging_id, "digest")
                    held.add(staging_id)
            await asyncio.sleep(0.1)

    # Faults

    async def _fault(self) -> None:
        await asyncio.sleep(self._random.uniform(0.2, 1.5))
        for life in self._present.values():
            life.check_alive()
        kinds = list(FAULTS)
        [kind] = self._random.choices(kinds, [FAULTS[name] for name in kinds])
        victim = self._victim()
        if victim is None:
            return
        await getattr(self, f"_{kind}")(victim)
        self.figures.faults[kind] += 1

    def _victim(self) -> Life | None:
        awake = [life for life in self._present.values() if life.awake]
        leading = [life for life in awake if life.name == self._leader]
        if leading and self._random.random() < OF_THE_LEADER:
            return leading[0]
        return self._random.choice(awake) if awake else None

    async def _kill(self, life: Life) -> None:
        await life.kill()
        cluster = life.name.partition("-")[0]
        del self._present[cluster]
        self._later(self._random.uniform(0.0, 1.0), lambda: self._start(cluster))

    async def _stop(self, life: Life) -> None:
        life.stop()
        self._later(self._random.uniform(0.2, 4.0), life.resume)

    async def _stop_and_cut(self, life: Life) -> None:
        """As a node that the network no longer reaches: the server gives its lock to another."""
        await self._stop(life)
        await self._cut(life)

    async def _cut(self, life: Life) -> None:
        async with await psycopg.AsyncConnection.connect(self._url, autocommit=True) as conn:
            at = time.monotonic()
            ended = await conn.execute(LOSE_LOCK, (life.name,))
            if ended.rowcount:
                life.cut_at.append(at)

    def _later(self, seconds: float, what: Callable[[], Awaitable[None]]) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            await what()

        self._recoveries.add(asyncio.create_task(wait()))

    # The end

    async def _settle(self) -> None:
        async with asyncio.timeout(SETTLE_S):
            while not await self._settled():
                for life in self._present.values():
                    life.check_alive()
                await asyncio.sleep(0.2)

    async def _settled(self) -> bool:
        async with self._database.transaction() as conn:
            waiting = [await edits.count(conn, state) for state in set(EditState) - SETTLED]
            return not any(waiting) and await jobs.next_unfinished(conn) is None

    async def _count(self, lives: Sequence[Life]) -> None:
        figures = self.figures
        async with self._database.transaction() as conn:
            figures.generation = (await serving.current(conn)).generation
            done, _ = await jobs.page(conn, state=JobState.DONE, limit=100_000)
            failed, _ = await jobs.page(conn, state=JobState.FAILED, limit=100_000)
        assert {job.error for job in failed} <= {"no queued edits are left for this job"}, failed
        figures.jobs_done, figures.jobs_empty = len(done), len(failed)
        figures.acknowledged = len(self._invariants.acknowledged)
        figures.leaderships = sum(len(life.times(LEADS)) for life in lives)
        figures.trainings = sum(len(life.times(TRAINS)) for life in lives)
        figures.trainings_refused = sum(len(life.times(REFUSED)) for life in lives)
        changes = [change for mine in self._audit.jobs().values() for change in mine]
        figures.changes = len(changes)
        figures.unled_changes = sum(change.by != change.leader for change in changes)

    def _compare_beliefs(self, lives: Sequence[Life]) -> None:
        led = sorted(
            ((start, end, life) for life in lives for start, end in life.led()),
            key=lambda one: one[0],
        )
        for (start, end, life), (next_start, next_end, _) in combinations(led, 2):
            if next_start >= end:
                continue
            cut = any(start <= at <= next_start for at in life.cut_at)
            assert cut, f"{life.name} led {start}-{end}, another from {next_start}: {life.cut_at}"
            overlap_s = life.awake_s(next_start, min(end, next_end))
            self.figures.overlaps += 1
            self.figures.longest_overlap_s = max(self.figures.longest_overlap_s, overlap_s)
