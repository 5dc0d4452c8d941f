"""The load of the swap benchmark on the naive ways to swap, on a Ray of its own."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice

import ray
from ray import serve

from service.node import RAY
from tests.benchmarks.swap_figures import Span
from tests.benchmarks.swap_naive import InFlight, Naive
from tests.benchmarks.swap_service import REPLICAS, VERSIONS, Running
from tests.benchmarks.swap_streams import Clients, Prompts, Stream
from tests.service_process import free_port

WAYS: dict[str, InFlight | None] = {
    "replicas restarted": None,
    "in place, in flight waited for": "wait",
    "in place, in flight given up": "abort",
    "in place, in flight kept": "keep",
}
Swap = Callable[[str, int], Awaitable[None]]
"""To a version, as the generation of that number."""


@dataclass(frozen=True)
class Course:
    """What happened to a load during which versions were swapped."""

    streams: Sequence[Stream]
    swaps: Sequence[Span]
    """From the request for each to its end."""

    @property
    def seconds(self) -> float:
        return max(s.times[-1] for s in self.streams if s.times) - self.streams[0].sent_at


def run_all(running: Running, prompts: Prompts, seconds: float, swaps: int) -> dict[str, Course]:
    """Each of `WAYS` under the load, for so long or for as long as its swaps take."""
    courses = {}
    port = free_port()
    with own_ray(port):
        for name, in_flight in WAYS.items():
            paths = ["/one"] if in_flight is None else ["/one", "/two"]
            deploy(running, paths, VERSIONS[0], 0)
            urls = [f"http://127.0.0.1:{port}{path}" for path in paths]
            swap = restart(running) if in_flight is None else in_place(paths, in_flight)
            courses[name] = asyncio.run(course(urls, prompts, swap, seconds, swaps))
            for path in paths:
                serve.delete(path[1:])
    return courses


async def course(
    urls: Sequence[str], prompts: Prompts, swap: Swap, seconds: float, swaps: int
) -> Course:
    """Swaps evenly through the load; a late one moves those after it."""
    clients, done = Clients(urls, prompts), asyncio.Event()
    load = asyncio.create_task(clients.run(done.is_set))
    spans, start = [], time.perf_counter()
    versions = islice(cycle([*VERSIONS[1:], VERSIONS[0]]), swaps)
    for number, version in enumerate(versions, 1):
        due = start + number * seconds / (swaps + 1)
        await asyncio.sleep(due - time.perf_counter())
        begun = time.perf_counter()
        await swap(version, number)
        spans.append((begun, time.perf_counter()))
    await asyncio.sleep(start + seconds - time.perf_counter())
    done.set()
    return Course(await load, spans)


def deploy(running: Running, paths: Sequence[str], version: str, generation: int) -> None:
    """An application for each path; one that is there already is started anew."""
    for path in paths:
        application = serve.deployment(Naive).options(
            num_replicas=REPLICAS // len(paths),
            max_ongoing_requests=256,
            ray_actor_options={"num_cpus": 0},
        )
        bound = application.bind(str(running.model), str(running.store), version, generation)
        serve.run(bound, name=path[1:], route_prefix=path)


def restart(running: Running) -> Swap:
    async def swap(version: str, generation: int) -> None:
        await asyncio.to_thread(deploy, running, ["/one"], version, generation)

    return swap


def in_place(paths: Sequence[str], in_flight: InFlight) -> Swap:
    """One replica after the other."""
    handles = [serve.get_app_handle(path[1:]) for path in paths]

    async def swap(version: str, generation: int) -> None:
        for handle in handles:
            await handle.swap.remote(version, generation, in_flight)

    return swap


@contextmanager
def own_ray(port: int) -> Iterator[None]:
    for name, value in RAY.items():
        os.environ.setdefault(name, value)
    for name in ("ray.serve", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
        _node_ip_address="127.0.0.1",
    )
    try:
        serve.start(
            http_options={"host": "127.0.0.1", "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
