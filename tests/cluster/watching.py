"""Clients that ask through every node's proxy all the time, and what they were told."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import httpx

MAX_TOKENS = 4
PAUSE_S = 0.1
CONNECT_S, ANSWER_S = 2.0, 30.0


@dataclass(frozen=True)
class Answer:
    """One query by the proxy at `address`; times are of the monotonic clock."""

    address: str
    asked_at: float
    told_at: float
    status: int | None
    """None: the connection failed, or nothing came in time."""
    version: str = ""
    generation: int = 0
    text: str = ""


class Watch:
    """Asks `prompt` of each of `addresses`, by a thread each, with a pause between two queries."""

    def __init__(self, addresses: Sequence[str], prompt: str, pause_s: float = PAUSE_S) -> None:
        self._prompt = prompt
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(one,)) for one in addresses]
        self.told: list[Answer] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def answers(self, address: str, since: float = 0.0) -> list[Answer]:
        """Those asked there since then that were answered, in order."""
        return [
            one
            for one in self.told
            if one.address == address and one.status == 200 and one.asked_at >= since
        ]

    def outcomes(self, address: str, since: float) -> dict[int | None, int]:
        """How many queries asked there since then ended with each status."""
        return Counter(
            one.status for one in self.told if one.address == address and one.asked_at >= since
        )

    def gap(self, address: str, since: float) -> float:
        """The longest time, in seconds, without an answer from there; since then."""
        times = [since, *(one.told_at for one in self.answers(address, since)), time.monotonic()]
        return max(later - earlier for earlier, later in pairwise(times))

    def wait_for(self, address: str, answers: int = 1, timeout_s: float = 90) -> None:
        """Until so many queries that begin from now on were answered there."""
        since = time.monotonic()
        while len(self.answers(address, since)) < answers:
            assert time.monotonic() < since + timeout_s, f"{address} gives no answers"
            self._stop.wait(0.05)

    def _ask_on(self, address: str) -> None:
        with httpx.Client(
            base_url=f"http://{address}:8000",
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            # A connection a query: one that a cut has broken must not hold the next ones up.
            limits=httpx.Limits(max_keepalive_connections=0),
        ) as client:
            while not self._stop.wait(self._pause_s):
                self.told.append(self._ask(client, address))

    def _ask(self, client: httpx.Client, address: str) -> Answer:
        body = {
            "model": "errata",
            "prompt": self._prompt,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
        }
        asked_at = time.monotonic()
        try:
            response = client.post("/v1/completions", json=body)
        except httpx.TransportError:
            return Answer(address, asked_at, time.monotonic(), None)
        if response.is_error:
            return Answer(address, asked_at, time.monotonic(), response.status_code)
        return Answer(
            address,
            asked_at,
            time.monotonic(),
            response.status_code,
            response.headers["X-Errata-Version"],
            int(response.headers["X-Errata-Generation"]),
            response.json()["choices"][0]["text"],
        )


@contextmanager
def watching(addresses: Sequence[str], prompt: str, pause_s: float = PAUSE_S) -> Iterator[Watch]:
    """Clients at work for as long as the block lasts."""
    watch = Watch(addresses, prompt, pause_s)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
