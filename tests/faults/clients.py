"""What clients see while faults happen: they ask all the time and keep each answer and failure."""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from service.client import ApiError, Client

MAX_TOKENS = 8


@dataclass(frozen=True)
class Told:
    """An answer, by the version that it names, or why there was none."""

    prompt: str
    version: str
    text: str
    error: ApiError | None
    seconds: float


def ask(api: Client, prompt: str, model: str = "errata") -> Told:
    """One query; its error is told, not raised."""
    started = time.monotonic()
    try:
        text, version = api.ask(prompt, model=model, max_tokens=MAX_TOKENS)
    except ApiError as error:
        return Told(prompt, "", "", error, time.monotonic() - started)
    return Told(prompt, version, text, None, time.monotonic() - started)


def misattributed(api: Client, told: Iterable[Told]) -> list[Told]:
    """The answers that are not what the version they name answers when it is asked by name."""
    answers = [one for one in told if one.error is None]
    own = {
        (version, prompt): ask(api, prompt, f"errata@{version}")
        for version, prompt in {(one.version, one.prompt) for one in answers}
    }
    return [one for one in answers if own[one.version, one.prompt].text != one.text]


class Asking:
    """Threads that ask `prompt` of `errata`, each a tenth of a second after it was answered."""

    def __init__(self, url: str, prompt: str) -> None:
        self._url = url
        self._prompt = prompt
        self._stop = threading.Event()
        self.told: list[Told] = []

    def run(self) -> None:
        with Client(self._url) as api:
            while not self._stop.wait(0.1):
                self.told.append(ask(api, self._prompt))

    def stop(self) -> None:
        self._stop.set()

    def wait_for(self, answers: int) -> None:
        """Until so many more answers were told."""
        wanted, deadline = len(self.told) + answers, time.monotonic() + 300
        while len(self.told) < wanted:
            assert time.monotonic() < deadline, f"no {answers} answers within 300 s"
            self._stop.wait(0.01)

    @property
    def errors(self) -> list[ApiError]:
        return [one.error for one in self.told if one.error]


@contextmanager
def asking(api: Client, prompt: str, clients: int = 2) -> Iterator[Asking]:
    """Clients at work for as long as the block lasts."""
    asked = Asking(api.url, prompt)
    threads = [threading.Thread(target=asked.run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield asked
    finally:
        asked.stop()
        for thread in threads:
            thread.join()


@dataclass
class Stream:
    """A streamed answer, as far as it came."""

    version: str
    text: str = ""
    error: str | None = None
    done: bool = False


def stream(url: str, model: str, prompt: str, max_tokens: int, begun: threading.Barrier) -> Stream:
    """Reads an answer to its end; all that pass `begun` have seen their first piece."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        told = Stream(response.headers["X-Errata-Version"])
        waited = False
        try:
            for line in response.iter_lines():
                take(told, line)
                if not waited and told.text:
                    begun.wait(60)
                    waited = True
        except httpx.TransportError as error:
            told.error = str(error)
    return told


def take(told: Stream, line: str) -> None:
    data = line.removeprefix("data: ")
    if data == "[DONE]":
        told.done = True
    elif data and "error" in (event := json.loads(data)):
        told.error = event["error"]["message"]
    elif data:
        assert event["system_fingerprint"] == f"errata-{told.version}"
        told.text += "".join(choice["text"] for choice in event["choices"])
