"""Swaps of the real service: under the load, one by one while it is idle, and what they take."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import httpx
import psutil

from tests.benchmarks.swap_others import Course, course
from tests.benchmarks.swap_service import VERSIONS, Commits, Notice, Running, heard
from tests.benchmarks.swap_streams import TIMEOUT_S, Prompts, Stream, completion, follow

PROBES = 4
PROBED_S = 0.3
"""So long before and after a commit."""


@dataclass(frozen=True)
class Swapped:
    """A swap: when it was asked for, when that was accepted, and what was committed when."""

    asked_at: float
    accepted_at: float
    committed: Notice

    @property
    def accepted_s(self) -> float:
        return self.accepted_at - self.asked_at

    @property
    def committed_s(self) -> float:
        return self.committed.at - self.asked_at


@dataclass(frozen=True)
class Probe:
    """A short answer, and the generation that its query was admitted to."""

    sent_at: float
    got_at: float
    generation: int


class Swapper:
    """Activates versions and waits for their commits."""

    def __init__(self, running: Running, commits: Commits, http: httpx.AsyncClient) -> None:
        self._url = running.process.client.url
        self._completions = running.completions
        self._commits = commits
        self._http = http

    async def activate(self, version: str) -> int:
        """Asks for it; the generation that it is to be."""
        response = await self._http.post(f"{self._url}/versions/{version}/activate", json={})
        response.raise_for_status()
        serving = response.json()
        generation: int = serving["generation"]
        return generation if serving["version"] == version else generation + 1

    async def swap(self, version: str) -> Swapped:
        asked_at = time.perf_counter()
        generation = await self.activate(version)
        accepted_at = time.perf_counter()
        async with asyncio.timeout(TIMEOUT_S):
            notice = await self._commits.reached(generation)
        return Swapped(asked_at, accepted_at, notice)

    async def first_answer(self, version: str, prompt: str) -> tuple[Swapped, float]:
        """A swap, then a query that is admitted to it: seconds from the one to the other's answer.

        They are from the request to activate to the first piece of the answer.
        """
        swapped = await self.swap(version)
        generation = swapped.committed.committed.generation
        stream = Stream(0, prompt, generation, time.perf_counter())
        await follow(self._http, self._completions, stream, max_tokens=1)
        if stream.error is not None or stream.version != version:
            raise RuntimeError(f"no answer by {version}: {stream.version} {stream.error}")
        return swapped, stream.times[0] - swapped.asked_at

    async def probe(self, prompt: str, found: list[Probe], until: asyncio.Event) -> None:
        """Asks for one token, again and again."""
        body = completion(prompt, max_tokens=1)
        while not until.is_set():
            sent_at = time.perf_counter()
            response = await self._http.post(self._completions, json=body)
            response.raise_for_status()
            generation = int(response.headers["X-Errata-Generation"])
            found.append(Probe(sent_at, time.perf_counter(), generation))


async def under_load(
    running: Running, prompts: Prompts, seconds: float, swaps: int
) -> tuple[Course, list[Swapped]]:
    """`swaps` of them between the three versions while the clients stream."""
    done: list[Swapped] = []
    async with heard(running.database_url) as commits, httpx.AsyncClient(timeout=TIMEOUT_S) as http:
        swapper = Swapper(running, commits, http)

        async def swap(version: str, number: int) -> None:
            done.append(await swapper.swap(version))

        found = await course([running.completions], prompts, swap, seconds, swaps)
    return found, done


async def rollbacks(running: Running, prompt: str, count: int) -> list[tuple[Swapped, float]]:
    """Of the idle service, every version resident: see `Swapper.first_answer`."""
    async with heard(running.database_url) as commits, httpx.AsyncClient(timeout=TIMEOUT_S) as http:
        swapper = Swapper(running, commits, http)
        versions = islice(cycle([*VERSIONS[1:], VERSIONS[0]]), count)
        return [await swapper.first_answer(version, prompt) for version in versions]


async def propagation(running: Running, prompt: str, count: int) -> list[tuple[float, float]]:
    """How long after a commit queries were still admitted to the generation before it.

    For each commit, from when on all that were sent were admitted to the new one, and when the last
    answer of the old one came, which was sent before. Several clients ask at once, so that every
    Api replica is asked all the time.
    """
    found = []
    async with heard(running.database_url) as commits, httpx.AsyncClient(timeout=TIMEOUT_S) as http:
        swapper = Swapper(running, commits, http)
        for version in islice(cycle([*VERSIONS[1:], VERSIONS[0]]), count):
            probes: list[Probe] = []
            done = asyncio.Event()
            asking = [swapper.probe(prompt, probes, done) for _ in range(PROBES)]
            tasks = [asyncio.create_task(one) for one in asking]
            await asyncio.sleep(PROBED_S)
            notice = (await swapper.swap(version)).committed
            await asyncio.sleep(PROBED_S)
            done.set()
            await asyncio.gather(*tasks)
            found.append(last_admitted(probes, notice))
    return found


def last_admitted(probes: Sequence[Probe], notice: Notice) -> tuple[float, float]:
    """Seconds after the commit: from when on all sent were admitted to it; the last old answer."""
    old = [probe for probe in probes if probe.generation < notice.committed.generation]
    sent, got = max(probe.sent_at for probe in old), max(probe.got_at for probe in old)
    since = min(probe.sent_at for probe in probes if probe.sent_at > max(sent, notice.at))
    return since - notice.at, max(0.0, got - notice.at)


def memory(replicas: Sequence[psutil.Process]) -> list[tuple[int, int]]:
    """Bytes of each replica's process: its own alone (USS), and with what it shares (RSS)."""
    full = [replica.memory_full_info() for replica in replicas]
    return [(info.uss, info.rss) for info in full]
