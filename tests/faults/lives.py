"""The lives of coordinators' processes: begun, stopped, killed; and what each told meanwhile.

All times are by the machine's monotonic clock.
"""

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.faults.candidate import LEADS, LEADS_NO_MORE, STARTED


class Life:
    """Of one process, from its start to its kill."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        """What it tells the database that it is called."""
        self.told: list[tuple[str, float]] = []
        self.cut_at: list[float] = []
        """When its lock was taken from it."""
        self._asleep: list[tuple[float, float]] = []
        self._stopped_at: float | None = None
        self._ended_at: float | None = None
        self._process = os.pidfd_open(pid)
        self._gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._process, self._gone.set)

    async def kill(self) -> None:
        """kill -9; returns once it is gone."""
        if self._stopped_at is not None:
            self._woken(self._stopped_at)
        self._ended_at = time.monotonic()
        signal.pidfd_send_signal(self._process, signal.SIGKILL)
        await self._gone.wait()
        asyncio.get_running_loop().remove_reader(self._process)
        os.close(self._process)

    def stop(self) -> None:
        self._stopped_at = time.monotonic()
        signal.pidfd_send_signal(self._process, signal.SIGSTOP)

    async def resume(self) -> None:
        """Unless it was killed meanwhile."""
        if self._stopped_at is not None:
            self._woken(self._stopped_at)
            signal.pidfd_send_signal(self._process, signal.SIGCONT)

    def check_alive(self) -> None:
        """Raises if it ended by itself, which nothing that is done to it gives it reason to."""
        assert not self.alive or not self._gone.is_set(), f"{self.name} ended by itself"

    @property
    def alive(self) -> bool:
        return self._ended_at is None

    @property
    def awake(self) -> bool:
        return self.alive and self._stopped_at is None

    def times(self, what: str) -> list[float]:
        """When it told of something."""
        return [at for told, at in self.told if told == what]

    def led(self) -> list[tuple[float, float]]:
        """From when to when it believed that it led; once it has ended."""
        assert self._ended_at is not None
        ends = [*self.times(LEADS_NO_MORE), self._ended_at]
        return [
            (start, min((end for end in ends if end >= start), default=start))
            for start in self.times(LEADS)
        ]

    def awake_s(self, start: float, end: float) -> float:
        """How much of a time it was not stopped."""
        asleep = (min(end, woken) - max(start, slept) for slept, woken in self._asleep)
        return end - start - sum(max(0.0, seconds) for seconds in asleep)

    def _woken(self, stopped_at: float) -> None:
        self._asleep.append((stopped_at, time.monotonic()))
        self._stopped_at = None


class Nursery:
    """Begins lives, and hears of them."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._begun: dict[str, asyncio.Future[Life]] = {}
        self._by_pid: dict[int, Life] = {}
        self.lives: list[Life] = []

    async def begin(self, name: str) -> Life:
        assert self._process.stdin is not None
        self._begun[name] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(f"{name}\n".encode())
        return await self._begun[name]

    async def listen(self) -> None:
        """To the end of the process that begins them, and of theirs."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            if said["what"] == STARTED:
                life = self._by_pid[said["pid"]] = Life(said["name"], said["pid"])
                self.lives.append(life)
                self._begun[life.name].set_result(life)
            self._by_pid[said["pid"]].told.append((said["what"], said["at"]))


@asynccontextmanager
async def nursery(url: str, data_dir: Path) -> AsyncIterator[Nursery]:
    """Coordinators of `url`; those that live are killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.faults.candidate", url, str(data_dir), stdin=PIPE, stdout=PIPE
    )
    made = Nursery(process)
    listening = asyncio.create_task(made.listen())
    try:
        yield made
    finally:
        for life in made.lives:
            if life.alive:
                await life.kill()
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
        await listening
