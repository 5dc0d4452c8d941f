"""kill -9 of a coordinator in each state of a rollout; the next one goes on from the database.

Real processes on a real store, without Ray: replicas are rows, and answers are given.
"""

import asyncio
import subprocess
from pathlib import Path

import pytest
from sqlalchemy import text

from service.edits import EditState
from service.jobs import JobState
from service.settings import Settings
from service.store import edits, gates, jobs, replicas, serving, versions
from service.store.database import Database
from service.versions import Canary, GateFinding, Serving, VersionState
from tests.backends import END_LOCK_HOLDERS
from tests.coordinating import (
    EDITS,
    acknowledge_staging,
    all_edits,
    coordinating,
    ended,
    served,
    start_job,
    trained,
    until,
    version,
)
from tests.faults.leader import leading, settings
from workers.contract import ProgressSink, TrainRequest, TrainResult

pytestmark = pytest.mark.anyio

PASSED = GateFinding(
    passed=True, edits_asked=2, edits_reliable=2, prompts_asked=0, prompts_unchanged=0
)


@pytest.fixture(name="settings")
def _settings(tmp_path: Path) -> Settings:
    return settings(tmp_path)


@pytest.fixture
async def store(database: Database, database_url: str, settings: Settings) -> Database:
    """v0 is live; v1 holds two edits; replica `a` has joined."""
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "base")
        await edits.add(conn, EDITS)
        assert await replicas.join(conn, "a", [])
    async with coordinating(database, database_url, settings):
        job = await start_job(database, activate=False)
        assert (await ended(database, job.id)).state is JobState.DONE
    return database


async def request(store: Database, version_id: str, **options: float) -> None:
    async with store.transaction() as conn:
        await serving.request(conn, version_id, **options)


async def leads(store: Database) -> bool:
    query = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted")
    async with store.transaction() as conn:
        return bool((await conn.execute(query)).scalar_one())


async def led(store: Database) -> None:
    async def look() -> bool | None:
        return await leads(store) or None

    await until(look)


async def kill(store: Database, process: "subprocess.Popen[str]") -> None:
    """Returns once the lead is free."""
    process.kill()
    process.wait()

    async def look() -> bool | None:
        return None if await leads(store) else True

    await until(look)


async def generation(store: Database, wanted: int) -> Serving:
    async def look() -> Serving | None:
        now = await served(store)
        return now if now.generation == wanted else None

    return await until(look)


async def asked(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    said = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 30)
    assert said == "asked\n"


async def is_live(store: Database) -> None:
    """v1, by one commit, and nothing is left of its rollout or lost of its edits."""
    now = await generation(store, 2)
    assert (now.version_id, now.staging_id, now.canary) == ("v1", None, None)
    assert (await version(store, "v1")).state is VersionState.LIVE
    assert (await version(store, "v0")).state is VersionState.RETIRED
    assert {edit.state for edit in await all_edits(store)} == {EditState.APPLIED}


async def test_while_it_is_staged(store: Database, database_url: str, settings: Settings) -> None:
    with leading(database_url, settings.data_dir) as process:
        await led(store)
        await request(store, "v1")
        await kill(store, process)
    assert (await version(store, "v1")).state is VersionState.STAGING
    async with coordinating(store, database_url, settings):
        await acknowledge_staging(store)
        await is_live(store)


async def test_while_the_gate_asks(store: Database, database_url: str, settings: Settings) -> None:
    with leading(database_url, settings.data_dir) as process:
        await led(store)
        await request(store, "v1")
        await acknowledge_staging(store)
        await asked(process)
        assert (await version(store, "v1")).state is VersionState.STAGED
        await kill(store, process)
    async with coordinating(store, database_url, settings):
        await is_live(store)


async def test_while_it_commits(store: Database, database_url: str, settings: Settings) -> None:
    """In the middle of the transaction, half of whose changes are made."""
    async with store.transaction() as conn:
        await gates.record(conn, "v1", PASSED)
    with leading(database_url, settings.data_dir) as process:
        await led(store)
        async with store.transaction() as conn:
            await conn.execute(text("SELECT 1 FROM versions WHERE id = 'v0' FOR UPDATE"))
            await request(store, "v1")
            await acknowledge_staging(store)
            await blocked(store)
            process.kill()
            process.wait()
        await kill(store, process)
    now = await served(store)
    assert (now.generation, now.version_id, now.staging_id) == (1, "v0", "v1")
    async with coordinating(store, database_url, settings):
        await is_live(store)


async def test_while_there_is_a_canary(
    store: Database, database_url: str, settings: Settings
) -> None:
    await request(store, "v1", percent=5.0)
    async with coordinating(store, database_url, settings):
        await acknowledge_staging(store)
        await generation(store, 2)
    with leading(database_url, settings.data_dir) as process:
        await led(store)
        await kill(store, process)
    assert (await served(store)).canary == Canary("v1", 5.0)
    async with coordinating(store, database_url, settings):
        await request(store, "v1")
        await acknowledge_staging(store)
        now = await generation(store, 3)
    assert (now.version_id, now.canary) == ("v1", None)


async def test_two_that_both_believe_they_lead_commit_once(
    store: Database, database_url: str, settings: Settings
) -> None:
    """As when the first was cut off: the database frees its lock, and it does not know yet."""
    async with coordinating(store, database_url, settings) as first:
        await led(store)
        async with store.transaction() as conn:
            await conn.execute(END_LOCK_HOLDERS)
        async with coordinating(store, database_url, settings):
            await request(store, "v1")
            await acknowledge_staging(store)
            await is_live(store)
            await first.check_health()


async def test_a_job_that_another_leader_went_on_with_is_left_to_it(
    store: Database, database_url: str, settings: Settings
) -> None:
    """As when a leader stood still for a while, and has not yet noticed that it leads no more."""

    async def advance(job_id: str) -> None:
        other = Database(database_url, pool_size=1)
        async with other.transaction() as conn:
            await jobs.advance(conn, job_id, JobState.TRAINING, JobState.EVALUATING)
        await other.dispose()

    def train(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        asyncio.run(advance(request.job_id))
        return trained(request, sink)

    async with store.transaction() as conn:
        await edits.add(conn, EDITS)
    async with coordinating(store, database_url, settings, train):
        job = await start_job(store, activate=False)
        assert (await ended(store, job.id)).state is JobState.DONE


async def blocked(store: Database) -> None:
    query = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock'"
    )

    async def look() -> bool | None:
        async with store.transaction() as conn:
            return bool((await conn.execute(query)).scalar_one()) or None

    await until(look)
