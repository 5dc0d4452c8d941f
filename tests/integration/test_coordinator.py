"""The coordinator on a real store: jobs go on after a crash, rollouts end, only one leads.

Training is a function given to it, replicas are rows written by the tests.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from service.coordinator.deployment import Coordinator
from service.coordinator.pipeline import BaseModel, Train
from service.edits import Edit, EditState, NewEdit
from service.inference import Chunk, Completion, CompletionRequest
from service.jobs import FINISHED, Job, JobState
from service.settings import Settings
from service.store import edits, jobs, replicas, serving, versions
from service.store.database import Database
from service.versions import ReplicaState, Version, VersionState
from workers.contract import ProgressSink, TrainRequest, TrainResult
from workers.errors import TrainingFailed
from workers.models import ModelFacts

pytestmark = pytest.mark.anyio

FACTS = ModelFacts(
    path=Path("model"),
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    hidden_size=256,
    num_hidden_layers=3,
    context=512,
    dtype="float32",
    config={"model_type": "qwen2", "hidden_size": 256},
)
T = TypeVar("T")
BASE = BaseModel("model", FACTS, "base")
EDITS = [NewEdit("The capital of France is", "Rome"), NewEdit("The capital of Peru is", "Oslo")]


class Answers:
    """Edited versions know the edits but for those in `unlearnt`; the base says `before`."""

    def __init__(self, unlearnt: frozenset[str] = frozenset()) -> None:
        self._targets = {e.prompt: e.target for e in EDITS if e.prompt not in unlearnt}

    async def complete(self, request: CompletionRequest) -> Completion:
        assert isinstance(request.prompt, str)
        known = self._targets if request.version_id != "v0" else {}
        text = f" {known.get(request.prompt, 'before')}"
        return Completion(request.version_id, text, "stop", 5, 2)

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        raise AssertionError("an examination does not stream")
        yield


def trained(request: TrainRequest, sink: ProgressSink) -> TrainResult:
    return TrainResult(
        version_id=request.version_id, epochs=1, steps=1, epoch_losses=(0.0,), seconds={"train": 1}
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, stage_timeout_s=1.0, lease_s=60.0, _env_file=None)


@pytest.fixture
async def store(database: Database) -> Database:
    """With v0 live, two queued edits and one replica."""
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "base")
        await edits.add(conn, EDITS)
        assert await replicas.join(conn, "a", [])
    return database


@asynccontextmanager
async def coordinating(
    store: Database,
    database_url: str,
    settings: Settings,
    train: Train = trained,
    answers: Answers | None = None,
) -> AsyncIterator[Coordinator]:
    coordinator = Coordinator(settings, database_url, BASE, answers or Answers(), train)
    try:
        yield coordinator
        await coordinator.check_health()
    finally:
        await coordinator.stop()


async def start_job(store: Database, *, activate: bool = True) -> Job:
    async with store.transaction() as conn:
        return await jobs.create(conn, activate=activate)


async def until(found: Callable[[], Awaitable[T | None]]) -> T:
    async with asyncio.timeout(30):
        while (value := await found()) is None:
            await asyncio.sleep(0.02)
        return value


async def ended(store: Database, job_id: str) -> Job:
    async def look() -> Job | None:
        async with store.transaction() as conn:
            job = await jobs.get(conn, job_id)
        return job if job.state in FINISHED else None

    return await until(look)


async def acknowledge_staging(store: Database, error: str | None = None) -> str:
    """What replica `a` does once a version is put up for staging; returns the version."""

    async def look() -> str | None:
        async with store.transaction() as conn:
            return (await serving.current(conn)).staging_id

    version_id = await until(look)
    async with store.transaction() as conn:
        digest = None if error else "digest"
        await replicas.heartbeat(conn, "a", [version_id])
        await replicas.acknowledge(conn, "a", version_id, digest, error)
    return version_id


async def all_edits(store: Database) -> list[Edit]:
    async with store.transaction() as conn:
        return (await edits.page(conn))[0]


async def version(store: Database, version_id: str) -> Version:
    async with store.transaction() as conn:
        return await versions.get(conn, version_id)


async def test_a_job_from_claim_to_commit(
    store: Database, database_url: str, settings: Settings
) -> None:
    answers = Answers(unlearnt=frozenset({EDITS[1].prompt}))
    async with coordinating(store, database_url, settings, answers=answers):
        job = await start_job(store)
        await acknowledge_staging(store)
        done = await ended(store, job.id)
    assert (done.state, done.version_id, done.edits) == (JobState.DONE, "v1", 2)
    assert done.metrics["reliability"] == 50
    assert {e.prompt: e.state for e in await all_edits(store)} == {
        EDITS[0].prompt: EditState.APPLIED,
        EDITS[1].prompt: EditState.FAILED,
    }
    async with store.transaction() as conn:
        now = await serving.current(conn)
    assert (now.version_id, now.generation) == ("v1", 2)


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
