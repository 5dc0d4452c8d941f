"""What streams and commits say: gaps around commits, the commits' own pauses, right answers.

Knows nothing of HTTP or services. Times are seconds; a span is its beginning and its end.
"""

import statistics
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.benchmarks.swap_streams import Stream

NEAR_S = 1.0
"""A gap within so long of a swap counts as around it."""

Span = tuple[float, float]
Answers = Mapping[str, Mapping[str, str]]
"""By version, by prompt."""


@dataclass(frozen=True)
class Correctness:
    answers: int
    errors: int
    wrong: int
    """Not its version's greedy answer: mixed, or another's."""
    mislabelled: int
    """Header, models and fingerprints do not name one and the same version."""
    stale: int
    """Of a generation before one that the same client had already seen."""

    @classmethod
    def of(cls, streams: Sequence[Stream], expected: Answers) -> "Correctness":
        ended = [stream for stream in streams if stream.error is None]
        return cls(
            len(streams),
            len(streams) - len(ended),
            sum(stream.text != expected[stream.version][stream.prompt] for stream in ended),
            sum(stream.labels != {labels(stream.version)} for stream in ended),
            sum(stream.generation < stream.minimum for stream in ended),
        )


def labels(version: str) -> tuple[str, str]:
    return f"errata@{version}", f"errata-{version}"


def lengths(spans: Iterable[Span]) -> list[float]:
    return [end - begin for begin, end in spans]


def split(spans: Iterable[Span], swaps: Sequence[Span]) -> tuple[list[float], list[float]]:
    """Lengths of the spans that touch the time around a swap, and of the others."""
    around: list[float] = []
    between: list[float] = []
    for begin, end in spans:
        near = any(begin <= last + NEAR_S and end >= first - NEAR_S for first, last in swaps)
        (around if near else between).append(end - begin)
    return around, between


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def pauses(streams: Sequence[Stream], moments: Sequence[float]) -> list[float]:
    """For each stream in flight at each moment: the gap that spans it, less the stream's median."""
    found = []
    for stream in streams:
        times = stream.times
        if len(times) < 3:
            continue
        usual = statistics.median(lengths(stream.gaps))
        for moment in moments:
            after = bisect_right(times, moment)
            if 0 < after < len(times):
                found.append(times[after] - times[after - 1] - usual)
    return found


def calm_moments(commits: Sequence[float], each: int = 5) -> list[float]:
    """Moments between commits, none within `NEAR_S` of one, to compare the commits with."""
    moments = []
    for first, second in pairwise(commits):
        begin, end = first + NEAR_S, second - NEAR_S
        if end > begin:
            moments += [begin + (end - begin) * (step + 0.5) / each for step in range(each)]
    return moments
