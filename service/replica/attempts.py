"""Trying again what may pass: so often, each time for so long, with growing pauses between."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from service.errors import Unavailable
from workers.errors import ArtifactError

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0

Found = TypeVar("Found")


@dataclass(frozen=True)
class Attempts:
    """How often something is asked for, and how long it may take each time."""

    number: int
    timeout_s: float

    def __call__(self, url: str, ask: Callable[[], Found]) -> Found:
        """What `ask` returns, which is to end within the timeout by itself.

        Raises `Unavailable`, naming `url`, when the last attempt failed. What is certain is raised
        at once: `FileNotFoundError`, and `ArtifactError` by what the file holds.
        """
        for attempt in range(1, self.number + 1):
            try:
                return ask()
            except (FileNotFoundError, ArtifactError):
                raise
            # Every file system's driver has errors of its own.
            except Exception as error:
                if attempt == self.number:
                    raise Unavailable(self._given_up(url, error)) from error
            time.sleep(_pause_s(attempt))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _given_up(self, url: str, error: Exception) -> str:
        last = f"{type(error).__name__}: {str(error) or 'it did not end in time'}"
        return (
            f"The version store cannot be read now: {url} was asked for {self.number} times, for "
            f"at most {self.timeout_s:g} s each; the last error was {last}"
        )


def _pause_s(attempt: int) -> float:
    """Doubling, and drawn, so that the replicas that failed together do not ask together."""
    longest = min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S)
    return random.uniform(longest / 2, longest)
