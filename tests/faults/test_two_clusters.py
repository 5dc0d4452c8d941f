"""Two clusters share a PostgreSQL: never two leaders, whatever dies, stops or is cut off.

`ERRATA_TEST_SEED` sets the order of the faults; `tests.benchmarks.two_coordinators` runs it longer.
"""

import os
from pathlib import Path

import pytest

from tests.faults.two_clusters import TwoClusters

pytestmark = pytest.mark.anyio

SEED = int(os.environ.get("ERRATA_TEST_SEED", "1"))
SECONDS = 15.0


async def test_one_leads_and_each_job_is_trained_by_one(database_url: str, tmp_path: Path) -> None:
    run = TwoClusters(database_url, tmp_path, SEED)
    await run.run(SECONDS)
    print(f"seed {SEED}: {run.figures}")
    run.check()
    assert run.figures.jobs_done > 0
    assert run.figures.faults["kill"] > 0
