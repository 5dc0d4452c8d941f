"""The clocks of nodes that differ by an hour: what is compared is the database's time.

The coordinator is a process of its own whose wall clock is shifted; the replica's is right.
"""

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import text

from service.edits import NewEdit
from service.jobs import JobState
from service.replica.bank import VersionBank
from service.replica.echo import EchoEngine
from service.replica.membership import Membership
from service.store import edits, jobs, serving, versions
from service.store.database import Database
from service.versions import Serving
from tests.coordinating import EDITS, coordinating, ended, served, start_job, until
from tests.faults.leader import leading, settings
from tests.tiny_model import publish, stored

pytestmark = pytest.mark.anyio

HOUR_S = 3600.0


@pytest.fixture
async def store(database: Database, database_url: str, tmp_path: Path) -> Database:
    """v0 is live; v1, which holds two edits, is published."""
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "base")
        await edits.add(conn, EDITS)
    async with coordinating(database, database_url, settings(tmp_path)):
        job = await start_job(database, activate=False)
        assert (await ended(database, job.id)).state is JobState.DONE
    publish(str(tmp_path), "v1", "base")
    return database


async def generation(store: Database, wanted: int) -> Serving:
    async def look() -> Serving | None:
        now = await served(store)
        return now if now.generation == wanted else None

    return await until(look)


async def started_jobs(store: Database) -> int:
    async with store.transaction() as conn:
        return len((await jobs.page(conn))[0])


@pytest.mark.parametrize("skew_s", [HOUR_S, -HOUR_S])
async def test_nothing_is_early_or_late(
    store: Database, database_url: str, tmp_path: Path, skew_s: float
) -> None:
    bank = VersionBank(EchoEngine(), stored(str(tmp_path), "base"), "base", capacity=2)
    member = Membership("a", store, bank, heartbeat_s=0.2)
    await member.join()
    heartbeats = asyncio.create_task(member.run())
    async with store.transaction() as conn:
        await edits.add(conn, [NewEdit("Half an hour is waited for", "more")])
        await serving.request(conn, "v1", percent=5.0, promote_after_s=2.0)
    with leading(database_url, tmp_path, skew_s=skew_s, talks=True):
        canary = (await generation(store, 2)).canary
        assert canary is not None
        assert (canary.version_id, canary.percent) == ("v1", 5.0)
        # By its own time, not at once and not in an hour.
        await asyncio.sleep(1)
        assert (await served(store)).generation == 2
        assert (await generation(store, 3)).committed.canary is None
        assert (await served(store)).version_id == "v1"
        assert await started_jobs(store) == 1
        async with store.transaction() as conn:
            await conn.execute(text("UPDATE edits SET created_at = now() - interval '31 minutes'"))

        async def second() -> bool | None:
            return await started_jobs(store) == 2 or None

        await until(second)
    heartbeats.cancel()
    await asyncio.gather(heartbeats, return_exceptions=True)
