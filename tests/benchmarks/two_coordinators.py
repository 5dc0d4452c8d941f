"""Two coordinators over one PostgreSQL, killed, stopped and cut off at random for minutes.

The same run as `tests.faults.test_two_clusters`, which says what must hold; it ends with an error
if something did not. Real coordinator processes without Ray, on an embedded PostgreSQL.

    python -m tests.benchmarks.two_coordinators --seconds 300 --seed 1 --json FILE
"""

import argparse
import asyncio
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from service.store.embedded import EmbeddedPostgres
from service.store.migrate import upgrade
from tests.benchmarks.report import Report
from tests.faults.two_clusters import NOTICES_S, TwoClusters


def measure(seconds: float = 300.0, seed: int = 1) -> Report:
    with tempfile.TemporaryDirectory(prefix="errata-") as directory:
        server = EmbeddedPostgres(Path(directory))
        try:
            url = server.start()
            upgrade(url)
            run = TwoClusters(url, Path(directory), seed)
            asyncio.run(run.run(seconds))
            run.check()
        finally:
            server.stop()
    return report(run, seed)


def report(run: TwoClusters, seed: int) -> Report:
    figures = asdict(run.figures)
    made = Report(f"Two coordinators over one PostgreSQL, seed {seed}")
    for name, times in figures.pop("faults").items():
        made.add(f"faults: {name}", times)
    bounds = {"most_leaders": 1, "longest_overlap_s": NOTICES_S}
    for name, value in figures.items():
        value = value if isinstance(value, int | float) else len(value)
        unit = "s" if name.endswith("_s") or name == "seconds" else ""
        target = {"at_most": bounds[name]} if name in bounds else {}
        made.add(name.removesuffix("_s").replace("_", " "), value, unit, **target)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.seconds, given.seed)
    found.show()
    if given.json:
        given.json.write_text(json.dumps(found.as_json(), indent=2) + "\n")


if __name__ == "__main__":
    main()
