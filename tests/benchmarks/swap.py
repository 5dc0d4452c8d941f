"""Hot swaps under load: the service's own, and beside them the naive ways to swap weights.

Two replicas, two Api replicas, three versions of the demo model made by real jobs; eight clients
stream greedy answers while versions are swapped. Every answer is compared with what its version
said beforehand. The naive ways answer the same load in the same run.

    python -m tests.benchmarks.swap --json FILE [--seconds 60 --swaps 12 --others-seconds 24]
"""

import argparse
import asyncio
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import swap_figures as figures
from tests.benchmarks import swap_load, swap_others, swap_service
from tests.benchmarks.report import Report
from tests.benchmarks.swap_figures import Answers, Correctness
from tests.benchmarks.swap_load import Swapped
from tests.benchmarks.swap_others import Course
from tests.benchmarks.swap_service import VERSIONS, Running
from tests.benchmarks.swap_streams import Stream
from workers.artifact import read_manifest

MIB = 1 << 20
SERVICE = "Errata"
IDLE_SWAPS = 12


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    seconds: float = 60.0
    swaps: int = 12
    others_seconds: float = 24.0
    others_swaps: int = 4


@dataclass
class Comparison(Report):
    """Also holds a row for each way to swap."""

    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    def show(self) -> None:
        super().show()
        names = list(next(iter(self.rows.values())))
        table = Table("", *names)
        for way, row in self.rows.items():
            table.add_row(way, *(f"{row[name]:,.4g}" for name in names))
        Console(width=140).print(table)

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "ways": self.rows}


def measure(sizes: Sizes = Sizes()) -> Comparison:
    """Starts and ends everything it needs; several minutes."""
    report = Comparison(
        f"{sizes.swaps} swaps between three versions in {sizes.seconds:g} s, 8 streaming clients"
    )
    with TemporaryDirectory(prefix="errata-") as folder:
        with swap_service.three_versions(Path(folder)) as running:
            expected, prompts = learn(report, running)
            idle(report, running, prompts[0])
            load = swap_load.under_load(running, prompts, sizes.seconds, sizes.swaps)
            course, swaps = asyncio.run(load)
        correctness(report, course, expected)
        timing(report, course.streams, swaps)
        report.rows[SERVICE] = row(course, expected)
        others = swap_others.run_all(running, prompts, sizes.others_seconds, sizes.others_swaps)
        report.rows |= {name: row(course, expected) for name, course in others.items()}
    return report


def learn(report: Report, running: Running) -> tuple[Answers, list[str]]:
    """Each version's answers, the prompts to ask, and what the versions take in memory."""
    prompts, url = swap_service.candidates(), running.completions
    for _ in range(2):
        asyncio.run(swap_service.ask_all(url, prompts, VERSIONS[:1]))
    one = swap_load.memory(running.replicas())
    expected = asyncio.run(swap_service.ask_all(url, prompts, VERSIONS))
    three = swap_load.memory(running.replicas())
    again = asyncio.run(swap_service.ask_all(url, prompts[::-1], VERSIONS))
    chosen = swap_service.usable(expected, again)
    report.details["prompts"] = {"asked": len(prompts), "used": len(chosen)}
    memory(report, running, one, three)
    return expected, chosen


def memory(
    report: Report,
    running: Running,
    one: Sequence[tuple[int, int]],
    three: Sequence[tuple[int, int]],
) -> None:
    manifests = [read_manifest(str(running.store), version) for version in VERSIONS[1:]]
    tuned = sum(manifest.bytes for manifest in manifests)
    pairs = zip(one, three, strict=True)
    grown = statistics.mean(after - before for (before, _), (after, _) in pairs)
    kept = swap_service.kv_bytes(running.model)
    report.add("replica with one version", statistics.mean(own for own, _ in one) / MIB, "MiB")
    report.add("more with three versions", grown / MIB, "MiB")
    report.add("tuned tensors of the two more", tuned / MIB, "MiB")
    report.add("KV cache, of all versions together", kept / MIB, "MiB")
    report.details["memory"] = {"one (USS, RSS)": one, "three (USS, RSS)": three}


def idle(report: Report, running: Running, prompt: str) -> None:
    swaps = asyncio.run(swap_load.rollbacks(running, prompt, IDLE_SWAPS))
    middle = statistics.median(took for _, took in swaps)
    report.add("roll back: request to first answer, idle", 1e3 * middle, "ms", at_most=100)
    late = asyncio.run(swap_load.propagation(running, prompt, IDLE_SWAPS))
    reached, last = (1e3 * max(times) for times in zip(*late, strict=True))
    report.add("commit to all Api replicas, worst", reached, "ms", at_most=100)
    report.add("commit to the last answer of the version before", last, "ms")
    report.details["idle"] = {
        "accepted, committed, answered": [(*parts(swap), took) for swap, took in swaps],
        "all admitted to the new, last answer of the old": late,
    }


def correctness(report: Report, course: Course, expected: Answers) -> None:
    found = Correctness.of(course.streams, expected)
    report.add("swaps", len(course.swaps))
    report.add("answers", found.answers)
    for name, count in asdict(found).items():
        if name != "answers":
            report.add(name, count, at_most=0)
    errors = {stream.error for stream in course.streams if stream.error}
    report.details["errors"] = sorted(errors)


def timing(report: Report, streams: Sequence[Stream], swaps: Sequence[Swapped]) -> None:
    commits = [swap.committed.at for swap in swaps]
    gaps = [gap for stream in streams for gap in stream.gaps]
    around, between = figures.split(gaps, [(at, at) for at in commits])
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        near, far = figures.quantile(around, share), figures.quantile(between, share)
        report.add(f"gap {name} within 1 s of commits", 1e3 * near, "ms")
        report.add(f"gap {name} between commits", 1e3 * far, "ms")
        target = {"at_most": 1.2} if name == "p99" else {}
        report.add(f"gap {name}, ratio", near / far, "x", **target)
    own = figures.pauses(streams, commits)
    calm = figures.pauses(streams, figures.calm_moments(commits))
    report.add("streams in flight at commits", len(own))
    at_commits, elsewhere = 1e3 * statistics.median(own), 1e3 * statistics.median(calm)
    report.add("gap over a commit less the usual", at_commits, "ms")
    # The gap that spans a given moment is longer than the usual one, whatever happens then.
    report.add("the same at other moments", elsewhere, "ms")
    report.add("pause that a commit adds", at_commits - elsewhere, "ms", at_most=5)
    took = 1e3 * statistics.median(swap.committed_s for swap in swaps)
    report.add("request to commit, under load", took, "ms")
    report.details["load"] = {
        "pauses at commits": own,
        "pauses at other moments": calm,
        "accepted, committed": [parts(swap) for swap in swaps],
    }


def parts(swap: Swapped) -> tuple[float, float]:
    return swap.accepted_s, swap.committed_s


def row(course: Course, expected: Answers) -> dict[str, float]:
    """A way to swap, in figures."""
    found = Correctness.of(course.streams, expected)
    gaps = [gap for stream in course.streams for gap in stream.gaps]
    waits = figures.lengths(wait for stream in course.streams for wait in stream.waits)
    around, between = figures.split(gaps, course.swaps)
    return {
        "answers": found.answers,
        "pieces a second": len(gaps) / course.seconds,
        "errors": found.errors,
        "wrong or mixed": found.wrong,
        "older than seen": found.stale,
        "longest wait, s": max(waits),
        "p99 gap around swaps, ms": 1e3 * figures.quantile(around, 0.99),
        "between, ms": 1e3 * figures.quantile(between, 0.99) if between else math.nan,
        "s a swap": statistics.median(figures.lengths(course.swaps)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    for name, default in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args())
    target = given.pop("json")
    report = measure(Sizes(**given))
    report.show()
    if target:
        target.write_text(json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
