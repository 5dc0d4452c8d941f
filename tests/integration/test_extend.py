"""What a job trains along, what it asks again, and what becomes of edits that no longer hold."""

import asyncio
import threading
from pathlib import Path

import pytest

from service.edits import Edit, EditState, NewEdit
from service.jobs import Job, JobKind, JobState
from service.settings import Settings
from service.store import edits, jobs, replicas, serving, versions
from service.store.database import Database
from service.versions import Verdict
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
)
from workers.contract import Anchor, LocalityProbe, ProgressSink, TrainRequest, TrainResult

pytestmark = pytest.mark.anyio

FRANCE, PERU = (edit.prompt for edit in EDITS)
CHAD = "The capital of Chad is"


class Recorder:
    """A training that only notes what it was asked for; the first one waits if told to."""

    def __init__(self, *, waits: bool = False) -> None:
        self.requests: list[TrainRequest] = []
        self.begun, self.release = threading.Event(), threading.Event()
        if not waits:
            self.release.set()

    def __call__(self, request: TrainRequest, sink: ProgressSink) -> TrainResult:
        self.requests.append(request)
        self.begun.set()
        self.release.wait()
        return trained(request, sink)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, stage_timeout_s=5.0, lease_s=60.0, _env_file=None)  # type: ignore[call-arg]


@pytest.fixture
async def store(database: Database) -> Database:
    """With v0 live, two queued edits and one replica."""
    return await begun(database)


async def add(store: Database, *new: NewEdit) -> None:
    async with store.transaction() as conn:
        await edits.add(conn, new)


async def run(store: Database, *, live: bool = True, **options: object) -> Job:
    """A job to its end, its version live or only published."""
    job = await start_job(store, activate=live, **options)
    if live:
        await acknowledge_staging(store)
    return await ended(store, job.id)


async def activate(store: Database, version_id: str) -> None:
    """Ask for a version and wait until it is live."""
    async with store.transaction() as conn:
        await serving.request(conn, version_id)
    await acknowledge_staging(store)

    async def look() -> bool | None:
        async with store.transaction() as conn:
            return (await serving.current(conn)).version_id == version_id or None

    await until(look)


async def newest(store: Database) -> dict[str, Edit]:
    """The last edit of each prompt."""
    return {edit.prompt: edit for edit in reversed(await all_edits(store))}


async def test_an_extend_rehearses_what_the_parent_holds_and_requeues_what_it_lost(
    store: Database, database_url: str, settings: Settings
) -> None:
    train, answers = Recorder(), Answers()
    await add(store, NewEdit(CHAD, "Lima"))
    answers.said = {
        "v1": {CHAD: "Lima"},
        "v2": {CHAD: "Lima", FRANCE: "Bonn", PERU: "Kiel"},
        "v3": {CHAD: "Lima", FRANCE: "Rome", PERU: "Kiel"},
    }
    async with coordinating(store, database_url, settings, train, answers):
        first = await run(store)
        await add(store, NewEdit(PERU, "Kiel"))
        second = await run(store, live=False)
        held_back = (await newest(store))[FRANCE]
        await activate(store, "v2")
        third = await run(store)
    assert "earlier" not in first.metrics
    assert train.requests[0].rehearsed == ()
    # Peru is trained anew, so the two others are the earlier ones.
    assert {e.prompt for e in train.requests[1].rehearsed} == {FRANCE, CHAD}
    assert (second.metrics["earlier"], second.metrics["earlier_asked"]) == (50, 2)
    assert (held_back.state, held_back.version_id) == (EditState.APPLIED, "v1")
    assert [e.prompt for e in train.requests[2].edits] == [FRANCE]
    assert {e.prompt for e in train.requests[2].rehearsed} == {PERU, CHAD}
    assert third.metrics["earlier"] == 100
    async with store.transaction() as conn:
        events = await edits.history(conn, held_back.id)
        held, _ = await edits.page(conn, version_id="v2")
    assert [event.state for event in events] == [
        *("queued", "claimed", "applied"),
        *("queued", "claimed", "applied"),
    ]
    assert events[3].detail == "v2 does not hold it; it answers: Bonn"
    assert {edit.prompt for edit in held} == {PERU, CHAD}


async def test_samples_are_as_large_as_asked_for(
    store: Database, database_url: str, settings: Settings
) -> None:
    train = Recorder()
    async with coordinating(store, database_url, settings.replace(train_workers_min=1), train):
        await run(store)
        await add(store, NewEdit(CHAD, "before"))
        job = await run(store, recheck=1, hparams={"rehearsal": 0, "formats": ["qa"]})
        await add(store, NewEdit(CHAD, "Lima"))
        none = await run(store, recheck=0, hparams={"rehearsal": 1})
    assert job.metrics == {"reliability": 100, "earlier": 100, "earlier_asked": 1}
    assert "earlier" not in none.metrics
    assert [len(request.rehearsed) for request in train.requests] == [0, 0, 1]
    assert train.requests[0].min_workers == 1


async def test_a_rejected_version_and_a_rollback_give_no_earlier_edit_back(
    store: Database, database_url: str, settings: Settings
) -> None:
    answers = Answers()
    answers.said = {"v2": {FRANCE: "Bonn"}, "v3": {FRANCE: "Bonn"}, "v4": {CHAD: "Lima"}}
    async with coordinating(store, database_url, settings, answers=answers):
        await run(store)
        await add(store, NewEdit(CHAD, "before"))
        rejected = await start_job(store)
        await acknowledge_staging(store, error="a digest differs")
        await ended(store, rejected.id)
        states = {prompt: edit.state for prompt, edit in (await newest(store)).items()}
        assert states == {FRANCE: "applied", PERU: "applied", CHAD: "queued"}
        await run(store)
        await add(store, NewEdit(CHAD, "Lima"))
        await run(store)
        assert (await newest(store))[FRANCE].version_id == "v4"
        await activate(store, "v3")
    assert (await newest(store))[FRANCE].state is EditState.APPLIED


async def test_a_lost_edit_whose_fact_was_edited_again_is_superseded(store: Database) -> None:
    async with store.transaction() as conn:
        for number in (1, 2):
            job = await jobs.create(conn)
            await edits.claim(conn, job)
            mine = await edits.of_job(conn, job.id)
            await versions.publish(
                conn,
                version_id=f"v{number}",
                parent_id=f"v{number - 1}",
                job_id=job.id,
                base_fingerprint="base",
                metrics={},
            )
            await edits.settle(conn, job.id, f"v{number}", [held(edit) for edit in mine])
            await edits.add(conn, [NewEdit(CHAD, f"Lima {number}")])
        france = next(e for e in (await edits.page(conn))[0] if e.prompt == FRANCE)
        await versions.record_verdicts(conn, "v2", [held(france, reliable=False)])
        (later,) = await edits.add(conn, [NewEdit(FRANCE, "Kiel")])
        await serving.request(conn, "v2")
        await replicas.acknowledge(conn, "a", "v2", "digest", None)
        await serving.commit(conn, "v2", 1, ["a"])
        assert (await edits.get(conn, france.id)).state is EditState.SUPERSEDED
        assert (await edits.get(conn, later.id)).state is EditState.QUEUED
        # A rebuild then has one edit of each fact: the newest.
        job = await jobs.create(conn, kind=JobKind.REBUILD)
        await edits.claim(conn, job)
        targets = sorted((e.prompt, e.target) for e in await edits.of_job(conn, job.id))
    assert targets == [(CHAD, "Lima 2"), (FRANCE, "Kiel"), (PERU, "Oslo")]


def held(edit: Edit, *, reliable: bool = True) -> Verdict:
    return Verdict(
        edit_id=edit.id, reliable=reliable, answer="said", generalization=None, locality=None
    )


async def test_anchors_are_decided_once_and_never_of_an_edited_fact(
    store: Database, database_url: str, settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "anchors"
    file.write_text(
        "the capital of  peru is\nThe Rhine is\n"
        '{"prompt": "2 + 2 =", "answer": "4"}\n{"prompt": "An endless tale:"}\nSilence:\n'
    )
    locality = (
        LocalityProbe(prompt="The Rhine is", answer="a river"),
        LocalityProbe(prompt="The Alps are"),
        LocalityProbe(prompt="Chad's capital is"),
    )
    await add(store, NewEdit(CHAD, "Lima", rephrases=("Chad's capital is",), locality=locality))
    answers = Answers()
    answers.said = {
        "v0": {"Alps": "mountains. They", "endless": "and so on…", "Silence": ""},
        "v1": {CHAD: "Lima"},
    }
    given = settings.replace(anchors=file)
    first, second = Recorder(waits=True), Recorder()
    async with coordinating(store, database_url, given, first, answers):
        hparams = {"anchor_locality": True, "anchor_prompts": 100}
        job = await start_job(store, activate=False, hparams=hparams)
        await asyncio.to_thread(first.begun.wait)
    first.release.set()
    file.write_text("changed")
    async with coordinating(store, database_url, given, second, answers):
        assert (await ended(store, job.id)).state is JobState.DONE
    assert sorted(second.requests[0].anchors, key=lambda anchor: anchor.prompt) == [
        Anchor(prompt="2 + 2 =", answer="4"),
        Anchor(prompt="The Alps are", answer="mountains"),
        Anchor(prompt="The Rhine is", answer="a river"),
    ]
    assert first.requests == second.requests


async def test_anchors_without_a_file_fail_the_job_and_name_the_setting(
    store: Database, database_url: str, settings: Settings
) -> None:
    async with coordinating(store, database_url, settings):
        job = await start_job(store, hparams={"anchor_prompts": 5})
        failed = await ended(store, job.id)
    assert failed.state is JobState.FAILED
    assert "ERRATA_ANCHORS" in (failed.error or "")
    assert {edit.state for edit in await all_edits(store)} == {EditState.QUEUED}
