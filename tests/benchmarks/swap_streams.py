"""Clients that stream completions for the swap benchmark, and what each of them saw, and when.

Knows HTTP and server-sent events, nothing of versions, services or figures. Times are seconds of
`time.perf_counter`.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import httpx

CLIENTS = 8
MAX_TOKENS = 96
TIMEOUT_S = 120.0

Prompts = Sequence[str]


@dataclass
class Stream:
    """One answer, piece by piece, as its client received it."""

    client: int
    prompt: str
    minimum: int
    """The newest serving generation that the client had seen before."""
    sent_at: float
    version: str = ""
    generation: int = -1
    error: str | None = None
    received: list[tuple[float, bytes]] = field(default_factory=list)

    @cached_property
    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """When each event was complete, and its content; the closing mark is left out."""
        events, held = [], b""
        for at, content in self.received:
            *whole, held = (held + content).split(b"\n\n")
            for event in whole:
                if event != b"data: [DONE]":
                    events.append((at, json.loads(event.removeprefix(b"data: "))))
        return events

    @cached_property
    def times(self) -> list[float]:
        return [at for at, _ in self.events]

    @property
    def text(self) -> str:
        return "".join(part["choices"][0]["text"] for _, part in self.events if "choices" in part)

    @property
    def labels(self) -> set[tuple[str, str]]:
        """Model and fingerprint of every event."""
        return {(part["model"], part["system_fingerprint"]) for _, part in self.events}

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """Beginning and end of the time between each two pieces."""
        return list(pairwise(self.times))

    @property
    def waits(self) -> list[tuple[float, float]]:
        """The gaps, and the time from the request to the first piece."""
        return list(pairwise([self.sent_at, *self.times]))


class Clients:
    """Streams without a pause between answers, each client one after the other.

    Every request carries the newest generation that its client has seen.
    """

    def __init__(self, urls: Sequence[str], prompts: Prompts, clients: int = CLIENTS) -> None:
        """`urls` of completions, taken in turn."""
        self._urls = urls
        self._prompts = prompts
        self._clients = clients
        self.streams: list[Stream] = []

    async def run(self, stopped: Callable[[], bool]) -> list[Stream]:
        """All streams, those that were begun before `stopped` to their end."""
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
            clients = [self._client(http, number, stopped) for number in range(self._clients)]
            await asyncio.gather(*clients)
        return self.streams

    async def _client(
        self, http: httpx.AsyncClient, number: int, stopped: Callable[[], bool]
    ) -> None:
        seen = 0
        first = number * len(self._prompts) // self._clients
        for turn in itertools.count(first):
            if stopped():
                return
            prompt = self._prompts[turn % len(self._prompts)]
            stream = Stream(number, prompt, seen, time.perf_counter())
            self.streams.append(stream)
            await follow(http, self._urls[turn % len(self._urls)], stream)
            seen = max(seen, stream.generation)


async def follow(
    http: httpx.AsyncClient, url: str, stream: Stream, max_tokens: int = MAX_TOKENS
) -> None:
    """Asks for the stream's prompt and fills the stream in; whatever fails is its `error`."""
    body = completion(stream.prompt, max_tokens=max_tokens, stream=True)
    headers = {"X-Errata-Min-Generation": str(stream.minimum)}
    try:
        async with http.stream("POST", url, json=body, headers=headers) as response:
            if response.is_error:
                stream.error = f"HTTP {response.status_code}: {(await response.aread())!r}"
                return
            stream.version = response.headers["X-Errata-Version"]
            stream.generation = int(response.headers["X-Errata-Generation"])
            async for content in response.aiter_raw():
                stream.received.append((time.perf_counter(), content))
    except httpx.TransportError as error:
        stream.error = repr(error)
        return
    if not stream.received[-1][1].endswith(b"data: [DONE]\n\n"):
        stream.error = f"ended early: {stream.received[-1][1]!r}"


def completion(prompt: str, model: str = "errata", **more: Any) -> dict[str, Any]:
    """The body of a greedy completion."""
    return {"model": model, "prompt": prompt, "temperature": 0, **more}
