"""The store's promises about edits and jobs, on a real PostgreSQL and under concurrency."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.edits import Edit, EditState, NewEdit
from service.errors import ConfigurationError, Conflict, InvalidInput, NotFound
from service.jobs import Job, JobKind, JobState
from service.store import edits, idempotency, jobs, trainers, versions
from service.store.database import Database
from service.store.ids import new_ids
from service.versions import Verdict, Version
from workers.contract import LocalityProbe, Progress

pytestmark = pytest.mark.anyio


def new(*prompts: str) -> list[NewEdit]:
    return [NewEdit(prompt=prompt, target="a target") for prompt in prompts]


def verdict(edit: Edit, reliable: bool = True) -> Verdict:
    return Verdict(
        edit_id=edit.id, reliable=reliable, answer="said", generalization=0.5, locality=None
    )


async def add(database: Database, *prompts: str) -> list[Edit]:
    async with database.transaction() as conn:
        return await edits.add(conn, new(*prompts))


async def state_of(database: Database, edit: Edit) -> EditState:
    async with database.transaction() as conn:
        return (await edits.get(conn, edit.id)).state


async def claimed(database: Database, **options: Any) -> Job:
    """A job that trains, with its claim and its version's id."""
    async with database.transaction() as conn:
        job = await jobs.create(conn, **options)
        await edits.claim(conn, job)
        return await jobs.advance(
            conn,
            job.id,
            JobState.PENDING,
            JobState.TRAINING,
            version_id=await versions.allocate(conn),
        )


async def settled(
    database: Database, job: Job, parent: str = "v0", failing: Sequence[str] = ()
) -> Version:
    """The job's version, published, in which the prompts of `failing` did not take."""
    assert job.version_id is not None
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "base")
        await versions.publish(
            conn,
            version_id=job.version_id,
            parent_id=parent,
            job_id=job.id,
            base_fingerprint="base",
            metrics={"reliability": 50.0},
        )
        mine = await edits.of_job(conn, job.id)
        await edits.settle(
            conn, job.id, job.version_id, [verdict(e, e.prompt not in failing) for e in mine]
        )
        return await versions.get(conn, job.version_id)


async def test_an_edit_comes_back_as_it_was_stored(database: Database) -> None:
    given = NewEdit(
        prompt="Der Chef von Ümlaut ist",
        target="日本",
        subject="Ümlaut",
        rephrases=("a", "b"),
        locality=(LocalityProbe(prompt="p"), LocalityProbe(prompt="q", answer="r")),
        metadata={"n": [1, 2.5, None, {"x": "\\u0000"}]},
    )
    async with database.transaction() as conn:
        (stored,) = await edits.add(conn, [given])
    async with database.transaction() as conn:
        read = await edits.get(conn, stored.id)
        (event,) = await edits.history(conn, stored.id)
        with pytest.raises(NotFound, match="ed_none"):
            await edits.get(conn, "ed_none")
    assert read == stored
    assert {name: getattr(read, name) for name in vars(given)} == vars(given)
    assert (read.state, event.state) == (EditState.QUEUED, EditState.QUEUED)
    assert read.created_at.tzname() == "UTC"


async def test_a_later_edit_of_a_queued_fact_supersedes_it(database: Database) -> None:
    (first,) = await add(database, "The CEO of X is")
    (second,) = await add(database, "the ceo  of x is")
    assert second.supersedes == first.id
    assert await state_of(database, first) is EditState.SUPERSEDED
    async with database.transaction() as conn:
        assert [e.state for e in await edits.history(conn, first.id)] == ["queued", "superseded"]


async def test_ids_only_grow(database: Database) -> None:
    async with database.transaction() as conn:
        ids = [one for _ in range(20) for one in await new_ids(conn, "ed", 20)]
        (later,) = await new_ids(conn, "ed", 1, after="ed_7" + "Z" * 25)
    assert ids == sorted(set(ids))
    assert {len(one) for one in ids} == {len("ed_") + 26}
    assert later == "ed_8" + "0" * 25


async def test_order_is_the_databases_whatever_the_nodes_clocks_say(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, created = [], []
    for skew_s in (3600, -3600, 0):
        now = time.time()
        monkeypatch.setattr(time, "time", lambda fixed=now + skew_s: fixed)
        monkeypatch.setattr(time, "time_ns", lambda fixed=now + skew_s: int(fixed * 1e9))
        stored += await add(database, f"fact {skew_s}")
        async with database.transaction() as conn:
            created.append(await jobs.create(conn))
        monkeypatch.undo()
    async with database.transaction() as conn:
        assert (await jobs.next_unfinished(conn)) == created[0]
        assert [one.id for one in (await edits.page(conn))[0]] == [e.id for e in stored[::-1]]


async def test_a_later_edit_replaces_an_earlier_one_even_if_the_clock_went_back(
    database: Database,
) -> None:
    (old,) = await add(database, "x")
    ahead = "ed_7" + old.id[4:]
    async with database.transaction() as conn:
        await conn.execute(text("DELETE FROM edit_events"))
        await conn.execute(text("UPDATE edits SET id = :id"), {"id": ahead})
    job = await claimed(database)
    (newer,) = await add(database, "X")
    assert newer.supersedes == ahead
    async with database.transaction() as conn:
        assert await edits.release(conn, job.id, "given up") == 0
        assert (await edits.get(conn, ahead)).state is EditState.SUPERSEDED


async def test_in_one_call_the_last_of_a_fact_wins(database: Database) -> None:
    one, other, two = await add(database, "x", "y", "X ")
    assert [e.state for e in (one, other, two)] == ["superseded", "queued", "queued"]
    assert (one.supersedes, two.supersedes) == (None, one.id)


async def test_the_same_fact_stored_many_times_at_once_is_queued_once(database: Database) -> None:
    batches = await asyncio.gather(*(add(database, "x", f"other {n}", "y") for n in range(8)))
    states = Counter([await state_of(database, edit) for batch in batches for edit in batch])
    assert states == {EditState.QUEUED: 10, EditState.SUPERSEDED: 14}


async def test_prompts_longer_than_an_index_entry(database: Database) -> None:
    long = "\U0001f600" * 4096
    (first,), (second,) = await add(database, long), await add(database, long)
    assert second.supersedes == first.id


async def test_pages_are_newest_first_and_complete(database: Database) -> None:
    stored = await add(database, *(f"fact {n}" for n in range(7)))
    found: list[str] = []
    cursor: str | None = None
    async with database.transaction() as conn:
        while True:
            page, cursor = await edits.page(conn, limit=3, cursor=cursor)
            found += [edit.id for edit in page]
            if cursor is None:
                break
        (matching,) = (await edits.page(conn, q="FACT 3"))[0]
        assert (await edits.page(conn, q="%"))[0] == []
        with pytest.raises(InvalidInput, match="cursor"):
            await edits.page(conn, cursor="no cursor")
    assert found == [edit.id for edit in reversed(stored)]
    assert matching.prompt == "fact 3"


async def test_two_claims_at_once_never_share_an_edit(database: Database) -> None:
    stored = await add(database, *(f"fact {n}" for n in range(60)))
    async with database.transaction() as conn:
        three = [await jobs.create(conn, max_edits=40) for _ in range(3)]

    async def claim(job: Job) -> None:
        async with database.transaction() as conn:
            await edits.claim(conn, job)

    await asyncio.gather(*map(claim, three))
    async with database.transaction() as conn:
        had = [edit.id for job in three for edit in await edits.of_job(conn, job.id)]
    assert Counter(had) == Counter(edit.id for edit in stored)


async def test_a_claim_takes_the_oldest_or_the_ones_it_was_asked_for(database: Database) -> None:
    stored = await add(database, *"abcd")
    async with database.transaction() as conn:
        await conn.execute(text("UPDATE edits SET created_at = now() - interval '1 hour'"))
        assert await edits.oldest_queued_age(conn) == timedelta(hours=1)
        job = await jobs.create(conn, edit_ids=[stored[3].id])
        assert await edits.claim(conn, job) == 1
        job = await jobs.create(conn, max_edits=2)
        assert await edits.claim(conn, job) == 2
        assert [edit.prompt for edit in await edits.of_job(conn, job.id)] == ["a", "b"]
        assert await edits.count(conn, EditState.QUEUED) == 1
        claimed_edit = await edits.get(conn, stored[0].id)
    assert (claimed_edit.state, claimed_edit.job_id) == (EditState.CLAIMED, job.id)


async def test_a_job_needs_edits(database: Database) -> None:
    async with database.transaction() as conn:
        for kind in JobKind:
            with pytest.raises(Conflict, match="no queued edits"):
                await jobs.create(conn, kind=kind)
    (one, other) = await add(database, "x", "y")
    await claimed(database, edit_ids=[one.id])
    async with database.transaction() as conn:
        with pytest.raises(InvalidInput) as caught:
            await jobs.create(conn, edit_ids=[other.id, "ed_none", one.id])
    assert [(e.field, e.message) for e in caught.value.errors] == [
        ("edit_ids.1", "ed_none is no known edit"),
        ("edit_ids.2", f"{one.id} is claimed"),
    ]


async def test_a_job_moves_only_as_its_table_allows(database: Database) -> None:
    await add(database, "x")
    job = await claimed(database)
    async with database.transaction() as conn:
        assert await jobs.next_unfinished(conn) == job
        with pytest.raises(Conflict, match="is training, not pending"):
            await jobs.advance(conn, job.id, JobState.PENDING, JobState.TRAINING)
        with pytest.raises(Conflict, match="never followed"):
            await jobs.advance(conn, job.id, JobState.TRAINING, JobState.DONE)
        progress = Progress(
            epoch=1,
            max_epochs=2,
            step=3,
            loss=0.5,
            edits_done=4,
            edits_total=5,
            seconds_elapsed=6.0,
            seconds_left=7.0,
        )
        await trainers.take(conn, job, "trainer")
        await trainers.record_progress(conn, job.id, "trainer", progress)
        failed = await jobs.advance(conn, job.id, JobState.TRAINING, JobState.FAILED, error="why")
        assert await jobs.next_unfinished(conn) is None
    assert (failed.progress, failed.error) == (progress, "why")
    assert failed.finished_at is not None


async def test_a_settled_job_leaves_applied_and_failed_edits(database: Database) -> None:
    good, bad = await add(database, "good", "bad")
    version = await settled(database, await claimed(database), failing=["bad"])
    assert (await state_of(database, good), await state_of(database, bad)) == ("applied", "failed")
    assert version.edits == 1
    async with database.transaction() as conn:
        verdicts, _ = await versions.verdicts(conn, version.id)
        held, _ = await edits.page(conn, version_id=version.id)
        events = await edits.history(conn, bad.id)
        with pytest.raises(Conflict, match="no open edits"):
            await edits.settle(conn, version.job_id or "", version.id, verdicts)
    assert verdicts == [verdict(good), verdict(bad, reliable=False)]
    assert [edit.id for edit in held] == [good.id]
    assert [event.state for event in events] == ["queued", "claimed", "failed"]
    assert events[-1].version_id == version.id


async def test_verdicts_must_be_those_of_the_job(database: Database) -> None:
    one, other = await add(database, "x", "y")
    job = await claimed(database, edit_ids=[one.id])
    async with database.transaction() as conn:
        with pytest.raises(Conflict, match="verdicts"):
            await edits.settle(conn, job.id, "v1", [verdict(one), verdict(other)])


async def test_a_later_version_holds_its_parents_edits_but_for_retrained_facts(
    database: Database,
) -> None:
    old, kept = await add(database, "x", "y")
    await settled(database, await claimed(database))
    (newer,) = await add(database, "X")
    assert newer.supersedes == old.id
    assert await state_of(database, old) is EditState.APPLIED
    version = await settled(database, await claimed(database), parent="v1")
    assert await state_of(database, old) is EditState.SUPERSEDED
    async with database.transaction() as conn:
        held, _ = await edits.page(conn, version_id=version.id)
        before, _ = await edits.page(conn, version_id="v1")
    assert {edit.id for edit in held} == {kept.id, newer.id}
    assert {edit.id for edit in before} == {kept.id, old.id}
    assert version.edits == 2


async def test_what_failed_leaves_the_parents_edit_held(database: Database) -> None:
    (old,) = await add(database, "x")
    await settled(database, await claimed(database))
    await add(database, "X")
    version = await settled(database, await claimed(database), parent="v1", failing=["X"])
    assert await state_of(database, old) is EditState.APPLIED
    assert version.edits == 1


async def test_a_rebuild_has_every_applied_edit_but_for_facts_it_trains_anew(
    database: Database,
) -> None:
    old, kept, lost = await add(database, "x", "y", "z")
    await settled(database, await claimed(database))
    (newer,) = await add(database, "X")
    job = await claimed(database, kind=JobKind.REBUILD)
    async with database.transaction() as conn:
        assert {e.id for e in await edits.of_job(conn, job.id)} == {kept.id, lost.id, newer.id}
        assert (await edits.get(conn, kept.id)).state is EditState.APPLIED
    version = await settled(database, job, failing=["z"])
    async with database.transaction() as conn:
        found = {e.id: (e.state, e.version_id) for e in (await edits.page(conn))[0]}
    assert version.edits == 2
    assert found == {
        old.id: ("superseded", "v1"),
        kept.id: ("applied", "v2"),
        lost.id: ("applied", "v1"),
        newer.id: ("applied", "v2"),
    }
    async with database.transaction() as conn:
        await edits.release(conn, job.id, "the version was rejected")
        again = await edits.get(conn, kept.id)
        back = await edits.get(conn, newer.id)
    assert (again.state, again.version_id) == ("applied", "v1")
    assert (back.state, back.version_id) == ("queued", None)


async def test_a_given_up_job_gives_its_edits_back(database: Database) -> None:
    one, other = await add(database, "x", "y")
    job = await claimed(database)
    (newer,) = await add(database, "X")
    assert newer.supersedes == one.id
    async with database.transaction() as conn:
        assert await edits.release(conn, job.id, "out of memory") == 1
        assert await edits.release(conn, job.id, "again") == 0
        *_, last = await edits.history(conn, other.id)
    assert await state_of(database, one) is EditState.SUPERSEDED
    assert last.state is EditState.QUEUED
    assert last.detail is not None
    assert "out of memory" in last.detail
    await claimed(database)
    assert await state_of(database, other) is EditState.CLAIMED


async def test_a_rejected_version_gives_its_edits_back(database: Database) -> None:
    (one,) = await add(database, "x")
    version = await settled(database, await claimed(database))
    async with database.transaction() as conn:
        assert await edits.release(conn, version.job_id or "", "rejected") == 1
        back = await edits.get(conn, one.id)
    assert (back.state, back.job_id, back.version_id) == ("queued", None, None)


async def test_storing_and_giving_back_the_same_fact_at_once(database: Database) -> None:
    async def give_back(job: Job) -> None:
        async with database.transaction() as conn:
            await edits.release(conn, job.id, "a race")

    for turn in range(10):
        (one,) = await add(database, f"x {turn}")
        job = await claimed(database)
        _, (newer,) = await asyncio.gather(give_back(job), add(database, f"X {turn}"))
        assert await state_of(database, one) is EditState.SUPERSEDED
        assert await state_of(database, newer) is EditState.QUEUED


async def test_storing_and_applying_the_same_fact_at_once(database: Database) -> None:
    for turn in range(8):
        await add(database, "x", "y", "z")
        job = await claimed(database)
        parent = f"v{turn}"
        version, _ = await asyncio.gather(
            settled(database, job, parent=parent), add(database, "z", "y", "x")
        )
        assert version.edits == 3
    async with database.transaction() as conn:
        assert await edits.count(conn, EditState.APPLIED) == 3
        assert await edits.count(conn, EditState.QUEUED) == 3


async def test_one_queued_edit_of_a_fact_is_a_constraint(database: Database) -> None:
    one, _ = await add(database, "x", "X")
    with pytest.raises(DBAPIError, match="uq_edits_one_queued_per_fact"):
        async with database.transaction() as conn:
            await conn.execute(text("UPDATE edits SET state = 'queued'"))
    assert await state_of(database, one) is EditState.SUPERSEDED


async def test_the_same_key_at_once_works_once(database: Database) -> None:
    done: list[int] = []

    async def call(number: int) -> dict[str, Any]:
        async with database.transaction() as conn:

            async def work() -> dict[str, Any]:
                done.append(number)
                (stored,) = await edits.add(conn, new("x"))
                return {"id": stored.id}

            return await idempotency.once(conn, key="k", route="r", body=b"{}", work=work)

    answers = await asyncio.gather(*map(call, range(8)))
    assert len(done) == 1
    assert all(answer == answers[0] for answer in answers)
    async with database.transaction() as conn:
        assert len((await edits.page(conn))[0]) == 1


async def test_a_key_is_bound_to_its_body_and_freed_by_failure(database: Database) -> None:
    async def fail() -> dict[str, Any]:
        raise Conflict("no")

    async def succeed() -> dict[str, Any]:
        return {"ok": True}

    with pytest.raises(Conflict, match="no"):
        async with database.transaction() as conn:
            await idempotency.once(conn, key="k", route="r", body=b"1", work=fail)
    async with database.transaction() as conn:
        await idempotency.once(conn, key="k", route="r", body=b"2", work=succeed)
        await idempotency.once(conn, key="k", route="s", body=b"3", work=succeed)
        with pytest.raises(Conflict, match="another body"):
            await idempotency.once(conn, key="k", route="r", body=b"1", work=succeed)


async def test_a_store_belongs_to_one_base_model(database: Database) -> None:
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "one")
        await versions.ensure_base(conn, "one")
        with pytest.raises(ConfigurationError, match=r"fingerprint one, .* has other"):
            await versions.ensure_base(conn, "other")
