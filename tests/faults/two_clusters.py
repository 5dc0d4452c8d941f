"""Two coordinators over one PostgreSQL, killed, stopped and cut off at random.

Real processes without Ray: what they train is a function, and the one replica is a row. Beside what
any `Rivals` show, each process told when it believed that it leads.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import combinations, count
from pathlib import Path
from typing import ClassVar

import psycopg

from service.edits import NewEdit
from service.store import edits, replicas, serving, versions
from tests.faults.audit import LOSE_LOCK, check_committed_once
from tests.faults.candidate import REFUSED, TRAINS, prompt
from tests.faults.lives import Life, nursery
from tests.faults.rivals import CLUSTERS, Figures, Rivals

NOTICES_S = 8.0
"""A leader that runs knows so soon that it leads no more: it asks each second, and waits for 5."""


@dataclass
class Beliefs(Figures):
    """And what the coordinators told."""

    trainings: int = 0
    trainings_refused: int = 0
    """Those that were told that another trains by now."""
    overlaps: int = 0
    """How often a leader that was cut off had yet to notice when another led already."""
    longest_overlap_s: float = 0.0
    """Of these, while it was awake."""


class TwoClusters(Rivals[Life]):
    """By their own word, too, two lead at once only until one that was cut off has noticed."""

    faults: ClassVar = {"kill": 4, "stop": 2, "stop_and_cut": 3, "cut": 2}
    pause_s = (0.2, 1.5)
    figures: Beliefs

    def __init__(self, url: str, data_dir: Path, seed: int) -> None:
        super().__init__(url, seed)
        self._data_dir = data_dir
        self._present: dict[str, Life] = {}
        self.figures = Beliefs(faults=dict.fromkeys(self.faults, 0))

    def check(self) -> None:
        super().check()
        commits = self._audit.commits()
        check_committed_once(commits)
        assert self.figures.jobs_done == len(commits)
        assert self.figures.longest_overlap_s < NOTICES_S

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        async with self._database.transaction() as conn:
            await versions.ensure_base(conn, "base")
            assert await replicas.join(conn, "a", [])
        async with (
            nursery(self._url, self._data_dir) as self._nursery,
            self.beside(self._replicate),
        ):
            await asyncio.gather(*map(self._start, CLUSTERS))
            try:
                yield
            finally:
                await self.end_recoveries()

    async def _start(self, cluster: str) -> None:
        number = len(self._nursery.lives)
        self._present[cluster] = await self._nursery.begin(f"{cluster}-{number}")

    def _able(self) -> Sequence[Life]:
        return [life for life in self._present.values() if life.awake]

    def _check_alive(self) -> None:
        for life in self._present.values():
            life.check_alive()

    # Beside the faults

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

    async def _kill(self, life: Life) -> None:
        await life.kill()
        cluster = life.name.partition("-")[0]
        del self._present[cluster]
        self.later(self._random.uniform(0.0, 1.0), lambda: self._start(cluster))

    async def _stop(self, life: Life) -> None:
        life.stop()
        self.later(self._random.uniform(0.2, 4.0), life.resume)

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

    # The end

    async def _count(self) -> None:
        await super()._count()
        # A leader began those when another had just claimed all edits.
        assert set(self.figures.failures) <= {"no queued edits are left for this job"}
        lives = self._nursery.lives
        self.figures.trainings = sum(len(life.times(TRAINS)) for life in lives)
        self.figures.trainings_refused = sum(len(life.times(REFUSED)) for life in lives)
        self._compare_beliefs(lives)

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
