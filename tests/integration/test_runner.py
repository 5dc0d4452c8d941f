"""A job is trained by one only: runners and leaders on a real store; training is a function."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.edits import EditState
from service.errors import ConfigurationError, Conflict
from service.jobs import Job, JobState, Trainer
from service.runner import Runner, check_base, ended
from service.settings import Settings
from service.store import jobs, trainers, versions
from service.store.database import Database
from service.store.progress import DatabaseProgress
from tests.backends import END_LOCK_HOLDERS
from tests.coordinating import (
    BASE,
    acknowledge_staging,
    all_edits,
    begun,
    coordinating,
    start_job,
    trained,
    until,
)
from workers.contract import Progress, ProgressSink, TrainRequest, TrainResult
from workers.errors import StoreUnavailable, TrainingFailed

pytestmark = pytest.mark.anyio

PROGRESS = Progress(
    epoch=1,
    max_epochs=2,
    step=3,
    loss=0.5,
    edits_done=4,
    edits_total=5,
    seconds_elapsed=6.0,
    seconds_left=7.0,
)
Train = Callable[[TrainRequest, ProgressSink], Awaitable[TrainResult]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, stage_timeout_s=5.0, lease_s=60.0, _env_file=None)


@pytest.fixture
async def store(database: Database) -> Database:
    """With v0 live, two queued edits and one replica."""
    return await begun(database)


async def train(request: TrainRequest, sink: ProgressSink) -> TrainResult:
    await asyncio.to_thread(sink, PROGRESS)
    return trained(request, sink)


def never(request: TrainRequest, sink: ProgressSink) -> TrainResult:
    raise AssertionError("the coordinator must leave the training to the runner")


async def create(conn: AsyncConnection, runner_id: str) -> Job:
    return await jobs.create(conn, runner_id=runner_id)


def runner(
    store: Database,
    url: str,
    settings: Settings,
    how: Train = train,
    shown: list[Job] | None = None,
) -> Runner:
    show = [] if shown is None else shown
    return Runner(store, url, settings, BASE, how, show.append)


async def lapse(store: Database, seconds: float = 0) -> None:
    """The leases of runners end, and have ended so long ago."""
    async with store.transaction() as conn:
        await conn.execute(
            text("UPDATE jobs SET lease_until = now() - make_interval(secs => :seconds)"),
            {"seconds": seconds},
        )


async def unfinished(store: Database) -> Job:
    async def look() -> Job | None:
        async with store.transaction() as conn:
            return await jobs.next_unfinished(conn)

    return await until(look)


async def test_a_runner_trains_and_the_coordinator_does_all_the_rest(
    store: Database, database_url: str, settings: Settings
) -> None:
    shown: list[Job] = []
    async with coordinating(store, database_url, settings, train=never):
        job = await runner(store, database_url, settings, shown=shown).run(create)
        assert (job.state, job.trained_by) == (JobState.EVALUATING, Trainer.RUNNER)
        await acknowledge_staging(store)
        done = await ended(store, job.id, shown.append)
    assert (done.state, done.version_id, done.progress) == (JobState.DONE, "v1", PROGRESS)
    assert {edit.state for edit in await all_edits(store)} == {EditState.APPLIED}
    assert JobState.PENDING in {job.state for job in shown}


async def test_what_a_runner_cannot_train_fails_and_its_edits_are_queued(
    store: Database, database_url: str, settings: Settings
) -> None:
    async def fail(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        raise TrainingFailed("loss is nan")

    async with coordinating(store, database_url, settings, train=never):
        job = await runner(store, database_url, settings, fail).run(create)
    assert (job.state, job.error) == (JobState.FAILED, "loss is nan")
    assert {edit.state for edit in await all_edits(store)} == {EditState.QUEUED}


async def test_a_runner_waits_for_a_version_store_that_is_away(
    store: Database, database_url: str, settings: Settings
) -> None:
    away = [StoreUnavailable("it does not answer")]

    async def train_at_last(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        if away:
            raise away.pop()
        return await train(request, sink)

    async with coordinating(store, database_url, settings, train=never):
        job = await runner(store, database_url, settings, train_at_last).run(create)
    assert (job.state, away) == (JobState.EVALUATING, [])


async def test_the_next_runner_goes_on_with_what_one_left(
    store: Database, database_url: str, settings: Settings
) -> None:
    begun_training = asyncio.Event()

    async def stand_still(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        begun_training.set()
        await asyncio.Event().wait()
        return trained(request, sink)

    async with coordinating(store, database_url, settings, train=never):
        first = asyncio.create_task(runner(store, database_url, settings, stand_still).run(create))
        await begun_training.wait()
        left = await unfinished(store)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        job = await runner(store, database_url, settings).run(create)
        assert (job.id, job.state, job.version_id) == (left.id, JobState.EVALUATING, "v1")
        assert job.trainer_id != left.trainer_id


async def test_a_runner_that_lives_is_not_interrupted_by_another(
    store: Database, database_url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has a job of its own, behind the first one's."""
    monkeypatch.setattr("service.runner.RENEW_S", 0.2)
    release = asyncio.Event()

    async def wait(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        await release.wait()
        return await train(request, sink)

    async def create_unchecked(conn: AsyncConnection, runner_id: str) -> Job:
        release.set()
        return await jobs.create(conn, runner_id=runner_id)

    async with coordinating(store, database_url, settings, train=never):
        first = asyncio.create_task(runner(store, database_url, settings, wait).run(create))
        held = await unfinished(store)
        with pytest.raises(Conflict, match="no queued edits"):
            await asyncio.gather(
                until_training(store), runner(store, database_url, settings).run(create_unchecked)
            )
        job = await first
    assert (job.id, job.trainer_id) == (held.id, held.trainer_id)


async def until_training(store: Database) -> None:
    async def look() -> bool | None:
        return (await unfinished(store)).state is JobState.TRAINING or None

    await until(look)


async def test_a_runner_that_stood_still_for_too_long_is_told(
    store: Database, database_url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its training ends with its next progress, and what it writes in the row is refused."""
    monkeypatch.setattr("service.runner.RENEW_S", 60.0)
    told: list[str] = []

    async def overtaken(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        await lapse(store)
        async with store.transaction() as conn:
            assert await trainers.take_abandoned(conn, "another") is not None
        with pytest.raises(Conflict, match="taken by another trainer") as refused:
            await asyncio.to_thread(sink, PROGRESS)
        told.append(str(refused.value))
        return trained(request, sink)

    async with coordinating(store, database_url, settings, train=never):
        with pytest.raises(Conflict, match="taken by another trainer"):
            await runner(store, database_url, settings, overtaken).run(create)
        job = await unfinished(store)
    assert (job.state, job.trainer_id, job.progress) == (JobState.TRAINING, "another", None)
    assert len(told) == 1


async def test_a_job_without_a_runner_fails_in_the_end(
    store: Database, database_url: str, settings: Settings
) -> None:
    async with store.transaction() as conn:
        job = await create(conn, "gone")
    async with coordinating(store, database_url, settings, train=never):
        await until_training(store)
        await lapse(store, settings.runner_timeout_s - 30)
        await asyncio.sleep(1)
        assert (await unfinished(store)).state is JobState.TRAINING
        await lapse(store, settings.runner_timeout_s + 30)
        failed = await ended(store, job.id, lambda job: None)
    assert failed.state is JobState.FAILED
    assert "no `errata jobs run --here` has gone on with it" in (failed.error or "")
    assert {edit.state for edit in await all_edits(store)} == {EditState.QUEUED}


async def test_a_model_other_than_the_services_is_refused(database: Database) -> None:
    with pytest.raises(ConfigurationError, match="no service has used this database"):
        await check_base(database, "base")
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "base")
    await check_base(database, "base")
    with pytest.raises(ConfigurationError, match=r"fingerprint base.*ERRATA_MODEL"):
        await check_base(database, "another")


async def test_a_leader_that_regains_its_lock_finds_its_training(
    store: Database, database_url: str, settings: Settings
) -> None:
    started: list[str] = []
    training, release = threading.Event(), threading.Event()

    def wait(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        started.append(request.job_id)
        training.set()
        release.wait()
        sink(PROGRESS)
        return trained(request, sink)

    async with coordinating(store, database_url, settings, train=wait):
        job = await start_job(store, activate=False)
        await asyncio.to_thread(training.wait)
        await cut_off(store)
        await led(store)
        release.set()
        assert (await ended(store, job.id, lambda job: None)).state is JobState.DONE
    assert started == [job.id]


async def test_a_leader_whose_job_was_taken_meanwhile_trains_it_anew_after_its_own_has_ended(
    store: Database, database_url: str, settings: Settings
) -> None:
    """Another led for a while, took the job and died: never two trainings in one process."""
    at_once: list[int] = []
    running, training, release = 0, threading.Event(), threading.Event()

    def count(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        nonlocal running
        running += 1
        at_once.append(running)
        training.set()
        release.wait()
        try:
            sink(PROGRESS)
        except Conflict as error:
            raise TrainingFailed(str(error)) from error
        finally:
            running -= 1
        return trained(request, sink)

    async with coordinating(store, database_url, settings, train=count):
        job = await start_job(store, activate=False)
        await asyncio.to_thread(training.wait)
        async with store.transaction() as conn:
            await trainers.take(conn, await jobs.get(conn, job.id), "another")
        await cut_off(store)
        await led(store)
        release.set()
        assert (await ended(store, job.id, lambda job: None)).state is JobState.DONE
    assert at_once == [1, 1]


async def test_a_job_is_taken_as_it_was_seen_or_not_at_all(
    store: Database, database_url: str
) -> None:
    async with store.transaction() as conn:
        seen = await jobs.create(conn)
    takes = [take(store, seen, name) for name in ("one", "two")]
    taken = await asyncio.gather(*takes, return_exceptions=True)
    [job] = [one for one in taken if isinstance(one, Job)]
    [refused] = [one for one in taken if isinstance(one, Conflict)]
    assert "taken by another leader" in str(refused)
    assert job.trainer_id is not None
    await asyncio.to_thread(DatabaseProgress(database_url, job.id, job.trainer_id), PROGRESS)
    with pytest.raises(Conflict, match="taken by another trainer"):
        await asyncio.to_thread(DatabaseProgress(database_url, job.id, "other"), PROGRESS)
    async with store.transaction() as conn:
        await jobs.advance(conn, job.id, JobState.PENDING, JobState.FAILED, error="why")
    with pytest.raises(Conflict, match="is failed: why"):
        await asyncio.to_thread(DatabaseProgress(database_url, job.id, job.trainer_id), PROGRESS)


async def take(store: Database, job: Job, trainer_id: str) -> Job:
    async with store.transaction() as conn:
        return await trainers.take(conn, job, trainer_id)


async def cut_off(store: Database) -> None:
    """The server ends the connection that holds the lead."""
    async with store.transaction() as conn:
        await conn.execute(END_LOCK_HOLDERS)


async def led(store: Database) -> None:
    query = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted")

    async def look() -> bool | None:
        async with store.transaction() as conn:
            return bool((await conn.execute(query)).scalar_one()) or None

    await until(look)
