"""Rollouts on a real store: the gate, canaries, who is waited for, and taking one up half-way.

Replicas are rows written by the tests, and answers are given.
"""

import asyncio
from pathlib import Path

import pytest

from service.coordinator import rollout as coordinator_rollout
from service.coordinator.rollout import Rollout
from service.edits import EditState
from service.errors import Conflict, VersionRejected
from service.inference import Completion, CompletionRequest
from service.jobs import JobState
from service.settings import Settings
from service.store import edits, replicas, serving
from service.store.database import Database
from service.versions import Canary, Serving, VersionState
from tests.coordinating import (
    EDITS,
    Answers,
    acknowledge_staging,
    all_edits,
    begun,
    coordinating,
    ended,
    served,
    start_job,
    until,
    version,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, stage_timeout_s=5.0, lease_s=60.0, _env_file=None)


@pytest.fixture
async def store(database: Database) -> Database:
    """With v0 live, two queued edits and one replica."""
    return await begun(database)


async def request(store: Database, version_id: str, **options: float) -> Serving:
    async with store.transaction() as conn:
        return await serving.request(conn, version_id, **options)


async def published(store: Database, database_url: str, settings: Settings) -> None:
    """v1, which holds both edits."""
    async with coordinating(store, database_url, settings):
        job = await start_job(store, activate=False)
        assert (await ended(store, job.id)).state is JobState.DONE


async def rejected(store: Database, version_id: str) -> str:
    async def look() -> str | None:
        found = await version(store, version_id)
        return found.error if found.state is VersionState.REJECTED else None

    return await until(look)


async def generation(store: Database, wanted: int) -> Serving:
    async def look() -> Serving | None:
        now = await served(store)
        return now if now.generation == wanted else None

    return await until(look)


class Forgetful(Answers):
    """From the moment that a version is staged it has forgotten what it was taught."""

    def __init__(self, store: Database) -> None:
        super().__init__()
        self._store = store

    async def complete(self, request: CompletionRequest) -> Completion:
        if (await served(self._store)).staging_id == request.version_id:
            self.said[request.version_id] = {edit.prompt: "no idea" for edit in EDITS}
        return await super().complete(request)


async def test_a_version_that_fails_the_gate_is_rejected_with_the_evidence(
    store: Database, database_url: str, settings: Settings
) -> None:
    async with coordinating(store, database_url, settings, answers=Forgetful(store)):
        job = await start_job(store)
        await acknowledge_staging(store)
        failed = await ended(store, job.id)
    assert failed.state is JobState.FAILED
    assert "0 of 2 of its edits" in (failed.error or "")
    found = await version(store, "v1")
    assert (found.state, found.error) == (VersionState.REJECTED, failed.error)
    assert found.gate is not None
    assert not found.gate.passed
    assert {answer.prompt for answer in found.gate.failures} == {edit.prompt for edit in EDITS}
    assert found.gate.failures[0].answer == "no idea"
    assert (await served(store)).version_id == "v0"
    assert {edit.state for edit in await all_edits(store)} == {EditState.QUEUED}


async def test_protected_prompts_must_be_answered_as_before(
    store: Database, database_url: str, settings: Settings, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"prompt": "The sky is", "answer": "before"}\nThe sea is\n')
    answers = Answers()
    answers.said["v1"] = {"The sea is": "dry"}
    guarded = settings.replace(gate_prompts=kept)
    async with coordinating(store, database_url, guarded, answers=answers):
        job = await start_job(store)
        await acknowledge_staging(store)
        assert (await ended(store, job.id)).state is JobState.FAILED
    gate = (await version(store, "v1")).gate
    assert gate is not None
    assert (gate.prompts_asked, gate.prompts_unchanged, gate.edits_reliable) == (2, 1, 2)
    [failure] = gate.failures
    assert (failure.prompt, failure.expected, failure.answer) == ("The sea is", "before", "dry")


async def test_a_version_that_a_replica_refuses_when_the_gate_asks_is_rejected(
    store: Database, database_url: str, settings: Settings
) -> None:
    class Refusing(Answers):
        async def complete(self, request: CompletionRequest) -> Completion:
            if (await served(store)).staging_id == request.version_id:
                raise VersionRejected("a digest differs")
            return await super().complete(request)

    async with coordinating(store, database_url, settings, answers=Refusing()):
        job = await start_job(store)
        await acknowledge_staging(store)
        assert (await ended(store, job.id)).error == "a digest differs"
    assert (await version(store, "v1")).state is VersionState.REJECTED
    assert (await served(store)).version_id == "v0"


async def test_a_file_of_protected_prompts_that_is_unfit_ends_the_rollout_only(
    store: Database, database_url: str, settings: Settings, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text("{}\n")
    async with coordinating(store, database_url, settings.replace(gate_prompts=kept)):
        job = await start_job(store)
        await acknowledge_staging(store)
        failed = await ended(store, job.id)
    assert f"gate_prompts: {kept}:1: there is no `prompt`" in (failed.error or "")
    assert (await version(store, "v1")).state is VersionState.PUBLISHED
    assert {edit.state for edit in await all_edits(store)} == {EditState.APPLIED}


async def test_what_was_live_before_is_not_asked_again(
    store: Database, database_url: str, settings: Settings
) -> None:
    answers = Answers()
    async with coordinating(store, database_url, settings, answers=answers):
        job = await start_job(store)
        await acknowledge_staging(store)
        await ended(store, job.id)
        asked = len(answers.asked)
        for number, version_id in enumerate(("v0", "v1"), 3):
            await request(store, version_id)
            await acknowledge_staging(store)
            assert (await generation(store, number)).version_id == version_id
    assert len(answers.asked) == asked


async def test_a_replica_that_runs_no_more_is_not_waited_for(
    store: Database, database_url: str, settings: Settings
) -> None:
    async with store.transaction() as conn:
        assert await replicas.join(conn, "killed", [])
    patient = settings.replace(stage_timeout_s=600.0)
    async with coordinating(store, database_url, patient, ended=frozenset({"killed"})):
        job = await start_job(store)
        await acknowledge_staging(store)
        assert (await ended(store, job.id)).state is JobState.DONE


@pytest.mark.parametrize("known", [set(), None])
async def test_replicas_of_another_cluster_are_waited_for_by_their_lease(
    store: Database,
    database_url: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    known: set[str] | None,
) -> None:
    """Whoever runs this cluster's replicas knows nothing of those."""

    async def running() -> set[str] | None:
        return None if known is None else {"a"}

    await published(store, database_url, settings)
    async with store.transaction() as conn:
        assert await replicas.join(conn, "elsewhere", [], cluster="another")
    monkeypatch.setattr(coordinator_rollout, "PROMPT_S", 0.0)
    rollout = Rollout(store, Answers(), settings, running)
    await request(store, "v1")
    await acknowledge_staging(store)
    await rollout.step()
    assert (await served(store)).staging_id == "v1"
    async with store.transaction() as conn:
        await replicas.acknowledge(conn, "elsewhere", "v1", "digest")
    await rollout.step()
    assert (await served(store)).version_id == "v1"


async def test_the_next_leader_goes_on_from_staged(
    store: Database, database_url: str, settings: Settings
) -> None:
    asked = asyncio.Event()

    class Halting(Answers):
        async def complete(self, request: CompletionRequest) -> Completion:
            if (await served(store)).staging_id == request.version_id:
                asked.set()
                await asyncio.Event().wait()
            return await super().complete(request)

    async with coordinating(store, database_url, settings, answers=Halting()):
        job = await start_job(store)
        await acknowledge_staging(store)
        await asked.wait()
        assert (await version(store, "v1")).state is VersionState.STAGED
    async with coordinating(store, database_url, settings):
        assert (await ended(store, job.id)).state is JobState.DONE
    assert (await served(store)).version_id == "v1"


async def test_a_canary_is_promoted_or_rolled_back(
    store: Database, database_url: str, settings: Settings
) -> None:
    await published(store, database_url, settings)
    async with coordinating(store, database_url, settings):
        await request(store, "v1", percent=5.0)
        await acknowledge_staging(store)
        now = await generation(store, 2)
        assert (now.version_id, now.canary) == ("v0", Canary("v1", 5.0))
        assert (await version(store, "v1")).state is VersionState.STAGED

        assert (await request(store, "v0")).canary is None
        assert (await served(store)).generation == 3
        assert (await version(store, "v1")).state is VersionState.PUBLISHED

        for number, percent in ((4, 5.0), (5, 50.0)):
            await request(store, "v1", percent=percent)
            await acknowledge_staging(store)
            assert (await generation(store, number)).canary == Canary("v1", percent)
        await request(store, "v1")
        await acknowledge_staging(store)
        now = await generation(store, 6)
    assert (now.version_id, now.canary) == ("v1", None)
    assert (await version(store, "v1")).state is VersionState.LIVE
    assert (await version(store, "v0")).state is VersionState.RETIRED


async def test_a_canary_is_promoted_by_itself(
    store: Database, database_url: str, settings: Settings
) -> None:
    await published(store, database_url, settings)
    async with coordinating(store, database_url, settings):
        await request(store, "v1", percent=5.0, promote_after_s=0.2)
        await acknowledge_staging(store)
        assert (await generation(store, 2)).version_id == "v0"
        await acknowledge_staging(store)
        assert (await generation(store, 3)).version_id == "v1"


async def test_a_promotion_waits_while_the_protected_prompts_cannot_be_read(
    store: Database,
    database_url: str,
    settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def told() -> bool | None:
        return "canary v1 cannot be promoted: gate_prompts" in caplog.text or None

    await published(store, database_url, settings)
    kept = tmp_path / "kept.txt"
    kept.write_text("The sky is\n")
    async with coordinating(store, database_url, settings.replace(gate_prompts=kept)):
        await request(store, "v1", percent=5.0, promote_after_s=1.0)
        await acknowledge_staging(store)
        await generation(store, 2)
        kept.write_text("{}\n")
        await until(told)
        kept.write_text("The sky is\n")
        await acknowledge_staging(store)
        assert (await generation(store, 3)).version_id == "v1"


async def test_a_canary_that_fails_the_gate_again_is_rolled_back_by_itself(
    store: Database, database_url: str, settings: Settings
) -> None:
    await published(store, database_url, settings)
    answers = Answers()
    async with coordinating(store, database_url, settings, answers=answers):
        await request(store, "v1", percent=5.0, promote_after_s=0.5)
        await acknowledge_staging(store)
        await generation(store, 2)
        answers.said["v1"] = {edit.prompt: "no idea" for edit in EDITS}
        assert "0 of 2 of its edits" in await rejected(store, "v1")
    now = await served(store)
    assert (now.generation, now.version_id, now.canary) == (3, "v0", None)


async def test_a_canary_is_another_version_and_the_only_one(
    store: Database, database_url: str, settings: Settings
) -> None:
    await published(store, database_url, settings)
    with pytest.raises(Conflict, match="v0 is live"):
        await request(store, "v0", percent=5.0)
    async with coordinating(store, database_url, settings):
        await request(store, "v1", percent=5.0)
        with pytest.raises(Conflict, match="v1 is being rolled out"):
            await request(store, "v1", percent=6.0)
        await acknowledge_staging(store)
        await generation(store, 2)
    async with store.transaction() as conn:
        await edits.add(conn, EDITS)
    async with coordinating(store, database_url, settings):
        assert (await ended(store, (await start_job(store, activate=False)).id)).version_id == "v2"
        with pytest.raises(Conflict, match="v1 is the canary; promote it, or roll it back"):
            await request(store, "v2", percent=5.0)
        await request(store, "v2")
        await acknowledge_staging(store)
        now = await generation(store, 3)
    assert (now.version_id, now.canary) == ("v2", Canary("v1", 5.0))


async def test_a_canary_whose_promotion_is_given_up_stays_a_canary(
    store: Database, database_url: str, settings: Settings
) -> None:
    await published(store, database_url, settings)
    async with coordinating(store, database_url, settings):
        await request(store, "v1", percent=5.0)
        await acknowledge_staging(store)
        await generation(store, 2)
    await request(store, "v1")
    async with store.transaction() as conn:
        await serving.abandon(conn, "v1", error="too slow", rejected=False)
    now = await served(store)
    assert (now.generation, now.canary, now.staging_id) == (2, Canary("v1", 5.0), None)
    assert (await version(store, "v1")).state is VersionState.STAGED
