"""The coordinator on a real store: jobs go on after a crash, rollouts end, only one leads.

Training is a function given to it, replicas are rows written by the tests.
"""

import asyncio
import threading
from pathlib import Path

import pytest

from service.edits import EditState
from service.jobs import Job, JobState
from service.settings import Settings
from service.store import jobs, replicas, serving, versions
from service.store.database import Database
from service.versions import ReplicaState, VersionState
from tests.coordinating import (
    EDITS,
    Answers,
    acknowledge_staging,
    all_edits,
    begun,
    coordinating,
    ended,
    start_job,
    trained,
    until,
    version,
)
from workers.contract import ProgressSink, TrainRequest, TrainResult
from workers.errors import StoreUnavailable, TrainingFailed

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, stage_timeout_s=1.0, lease_s=60.0, _env_file=None)


@pytest.fixture
async def store(database: Database) -> Database:
    """With v0 live, two queued edits and one replica."""
    return await begun(database)


async def test_a_job_from_claim_to_commit(
    store: Database, database_url: str, settings: Settings
) -> None:
    answers = Answers(unlearnt=frozenset({EDITS[1].prompt}))
    async with coordinating(store, database_url, settings, answers=answers):
        job = await start_job(store)
        await acknowledge_staging(store)
        done = await ended(store, job.id)
    assert (done.state, done.version_id, done.edits) == (JobState.DONE, "v1", 2)
    raw_and_others = ("reliability", "reliability.qa", "reliability.prefix")
    assert [done.metrics[name] for name in raw_and_others] == [50, 50, 50]
    assert {e.prompt: e.state for e in await all_edits(store)} == {
        EDITS[0].prompt: EditState.APPLIED,
        EDITS[1].prompt: EditState.FAILED,
    }
    async with store.transaction() as conn:
        now = await serving.current(conn)
        (one, other), _ = await versions.verdicts(conn, "v1")
    assert (now.version_id, now.generation) == ("v1", 2)
    assert set(one.formats) == {"qa", "prefix"}
    assert one.formats["qa"].answer == one.answer == "Rome"
    assert not other.formats["prefix"].reliable
    assert len(set(answers.asked)) == 3 * len(EDITS)
    asked_by_the_gate = 1
    assert len(answers.asked) == 3 * len(EDITS) + asked_by_the_gate


async def test_a_version_that_is_not_to_be_activated_is_only_published(
    store: Database, database_url: str, settings: Settings
) -> None:
    async with coordinating(store, database_url, settings):
        job = await start_job(store, activate=False)
        assert (await ended(store, job.id)).state is JobState.DONE
    assert (await version(store, "v1")).state is VersionState.PUBLISHED
    assert (await version(store, "v0")).state is VersionState.LIVE


async def test_another_coordinator_goes_on_where_one_stopped(
    store: Database, database_url: str, settings: Settings
) -> None:
    training, release = threading.Event(), threading.Event()

    def interrupted(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        training.set()
        release.wait()
        return trained(request, sink)

    async with coordinating(store, database_url, settings, train=interrupted):
        job = await start_job(store)
        await asyncio.to_thread(training.wait)
    release.set()
    requests: list[TrainRequest] = []

    def recorded(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        requests.append(request)
        return trained(request, sink)

    async with coordinating(store, database_url, settings, train=recorded):
        await acknowledge_staging(store)
        assert (await ended(store, job.id)).state is JobState.DONE
    assert [request.version_id for request in requests] == ["v1"]
    assert len(requests[0].edits) == len(EDITS)


async def test_only_one_coordinator_leads(
    store: Database, database_url: str, settings: Settings
) -> None:
    trainings: list[str] = []

    def counted(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        trainings.append(request.job_id)
        return trained(request, sink)

    async with (
        coordinating(store, database_url, settings, train=counted),
        coordinating(store, database_url, settings, train=counted),
    ):
        job = await start_job(store)
        await acknowledge_staging(store)
        assert (await ended(store, job.id)).state is JobState.DONE
    assert trainings == [job.id]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TrainingFailed("loss is nan"), "loss is nan"),
        (KeyError("bug"), "internal error: KeyError: 'bug'"),
    ],
)
async def test_a_failed_job_gives_its_edits_back_and_the_next_one_runs(
    store: Database, database_url: str, settings: Settings, error: Exception, said: str
) -> None:
    failures = [error]

    def failing_once(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        if failures:
            raise failures.pop()
        return trained(request, sink)

    async with coordinating(store, database_url, settings, train=failing_once):
        failed = await ended(store, (await start_job(store)).id)
        assert (failed.state, failed.error) == (JobState.FAILED, said)
        assert {edit.state for edit in await all_edits(store)} == {EditState.QUEUED}
        again = await start_job(store, activate=False)
        assert (await ended(store, again.id)).state is JobState.DONE
    assert {edit.state for edit in await all_edits(store)} == {EditState.APPLIED}


async def test_a_version_store_that_is_away_is_waited_for(
    store: Database, database_url: str, settings: Settings
) -> None:
    away = [StoreUnavailable("it does not answer"), StoreUnavailable("it still does not")]

    def trained_at_last(request: TrainRequest, sink: ProgressSink) -> TrainResult:
        if away:
            raise away.pop()
        return trained(request, sink)

    async with coordinating(store, database_url, settings, train=trained_at_last):
        job = await ended(store, (await start_job(store, activate=False)).id)
    assert (job.state, away) == (JobState.DONE, [])


async def test_a_version_that_fails_verification_is_rejected_and_its_edits_queued(
    store: Database, database_url: str, settings: Settings
) -> None:
    async with coordinating(store, database_url, settings):
        job = await start_job(store)
        await acknowledge_staging(store, error="shard x: expected sha256 1, found 2")
        failed = await ended(store, job.id)
    assert (failed.state, failed.error) == (JobState.FAILED, "shard x: expected sha256 1, found 2")
    assert (await version(store, "v1")).state is VersionState.REJECTED
    assert (await version(store, "v0")).state is VersionState.LIVE
    assert {edit.state for edit in await all_edits(store)} == {EditState.QUEUED}


async def test_a_replica_that_does_not_stage_is_fenced_and_not_waited_for(
    store: Database, database_url: str, settings: Settings
) -> None:
    async with store.transaction() as conn:
        assert await replicas.join(conn, "silent", [])
    async with coordinating(store, database_url, settings):
        job = await start_job(store)
        await acknowledge_staging(store)
        assert (await ended(store, job.id)).state is JobState.DONE
    async with store.transaction() as conn:
        states = {r.id: r.state for r in await replicas.seen(conn, 60)}
    assert states == {"a": ReplicaState.READY, "silent": ReplicaState.FENCED}


async def test_a_rollout_that_no_replica_stages_is_given_up(
    store: Database, database_url: str, settings: Settings
) -> None:
    async with coordinating(store, database_url, settings):
        job = await start_job(store)
        failed = await ended(store, job.id)
    assert failed.state is JobState.FAILED
    assert "no replica staged it within 1 s" in (failed.error or "")
    async with store.transaction() as conn:
        assert [replica.id for replica in await replicas.live(conn, 60)] == ["a"], "none is fenced"
    assert (await version(store, "v1")).state is VersionState.PUBLISHED
    assert {edit.state for edit in await all_edits(store)} == {EditState.APPLIED}


async def test_a_policy_starts_a_job(
    store: Database, database_url: str, settings: Settings
) -> None:
    async def first_job() -> Job | None:
        async with store.transaction() as conn:
            found, _ = await jobs.page(conn)
        return found[0] if found else None

    async with coordinating(store, database_url, settings.replace(job_after_edits=len(EDITS))):
        job = await until(first_job)
        await acknowledge_staging(store)
        assert (await ended(store, job.id)).state is JobState.DONE
