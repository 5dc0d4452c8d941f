"""Queries on jobs. Which edits a job has is `edits.claim`'s business, who trains it `trainers`'."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.edits import EditState
from service.errors import Conflict, FieldError, InvalidInput, NotFound
from service.jobs import FINISHED, JOB_TRANSITIONS, Job, JobKind, JobState, Trainer
from service.store import cursors
from service.store.edit_states import among
from service.store.ids import new_ids
from service.store.tables import edits, jobs
from workers.contract import Progress

CHANNEL = "errata_jobs"
"""Notified with the id of each new job."""
LEASE = timedelta(seconds=30)
"""A runner that has not renewed its own for so long is gone."""

_RECORDED = {"edits", "parent_id", "version_id", "metrics", "seconds", "error"}


async def create(
    conn: AsyncConnection,
    *,
    kind: JobKind = JobKind.EXTEND,
    activate: bool = True,
    max_edits: int | None = None,
    edit_ids: Sequence[str] | None = None,
    hparams: Mapping[str, Any] | None = None,
    recheck: int | None = None,
    runner_id: str | None = None,
) -> Job:
    """A pending job; `Conflict` if there is nothing to train, `InvalidInput` for unfit edit ids.

    With `runner_id` it is that runner's to train, who has a lease of `LEASE` on it.
    """
    if edit_ids is not None:
        await _check_queued(conn, edit_ids)
    useful = {EditState.QUEUED} | ({EditState.APPLIED} if kind is JobKind.REBUILD else set())
    any_edit = select(edits.c.id).where(edits.c.state.in_(useful)).limit(1)
    if (await conn.execute(any_edit)).first() is None:
        raise Conflict("no queued edits: POST /edits first")
    (job_id,) = await new_ids(conn, "job", 1)
    row = await conn.execute(
        insert(jobs)
        .values(
            id=job_id,
            kind=kind,
            state=JobState.PENDING,
            activate=activate,
            max_edits=max_edits,
            edit_ids=None if edit_ids is None else list(dict.fromkeys(edit_ids)),
            hparams=dict(hparams or {}),
            recheck=recheck,
            trained_by=Trainer.COORDINATOR if runner_id is None else Trainer.RUNNER,
            trainer_id=runner_id,
            lease_until=None if runner_id is None else func.now() + LEASE,
        )
        .returning(jobs)
    )
    await conn.execute(select(func.pg_notify(CHANNEL, job_id)))
    return of_row(row.one())


async def get(conn: AsyncConnection, job_id: str) -> Job:
    row = (await conn.execute(select(jobs).where(jobs.c.id == job_id))).one_or_none()
    if row is None:
        raise NotFound(f"no job {job_id}")
    return of_row(row)


async def page(
    conn: AsyncConnection,
    *,
    state: JobState | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> tuple[list[Job], str | None]:
    """Jobs newest first and the cursor of the next page."""
    query = select(jobs).order_by(jobs.c.id.desc()).limit(limit + 1)
    if state is not None:
        query = query.where(jobs.c.state == state)
    if cursor is not None:
        query = query.where(jobs.c.id < cursors.decode(cursor))
    found = [of_row(row) for row in await conn.execute(query)]
    return cursors.split(found, [job.id for job in found], limit)


async def next_unfinished(conn: AsyncConnection) -> Job | None:
    """The oldest job that has not ended."""
    query = select(jobs).where(jobs.c.state.not_in(sorted(FINISHED))).order_by(jobs.c.id).limit(1)
    row = (await conn.execute(query)).one_or_none()
    return None if row is None else of_row(row)


async def advance(
    conn: AsyncConnection,
    job_id: str,
    expected: JobState,
    to: JobState,
    *,
    trainer_id: str | None = None,
    **changes: Any,
) -> Job:
    """Move a job from `expected` to `to`; `Conflict` if it is elsewhere or may not.

    With `trainer_id`, only while nobody has taken the job from that one. `changes` are recorded
    along: edits, parent_id, version_id, metrics, seconds, error.
    """
    assert changes.keys() <= _RECORDED, f"not recorded with a change of state: {sorted(changes)}"
    if to not in JOB_TRANSITIONS[expected]:
        raise Conflict(f"job {job_id}: {expected} is never followed by {to}")
    finished = {"finished_at": func.now()} if to in FINISHED else {}
    expectation = [jobs.c.id == job_id, jobs.c.state == expected]
    if trainer_id is not None:
        expectation.append(jobs.c.trainer_id == trainer_id)
    result = await conn.execute(
        update(jobs)
        .where(*expectation)
        .values(state=to, updated_at=func.now(), **finished, **changes)
        .returning(jobs)
    )
    row = result.one_or_none()
    if row is None:
        job = await get(conn, job_id)
        if job.state is expected:
            raise Conflict(f"job {job_id} was taken by another trainer")
        raise Conflict(f"job {job_id} is {job.state}, not {expected}")
    return of_row(row)


async def _check_queued(conn: AsyncConnection, edit_ids: Sequence[str]) -> None:
    query = select(edits.c.id, edits.c.state).where(among(edits.c.id, edit_ids))
    states = {row.id: row.state for row in await conn.execute(query)}
    errors = tuple(
        FieldError(f"edit_ids.{place}", f"{edit_id} is {states.get(edit_id, 'no known edit')}")
        for place, edit_id in enumerate(edit_ids)
        if states.get(edit_id) is not EditState.QUEUED
    )
    if errors:
        raise InvalidInput("edit_ids: only queued edits can be asked for", errors)


def of_row(row: Row[Any]) -> Job:
    """A job from its row of the table."""
    return Job(
        id=row.id,
        kind=row.kind,
        state=row.state,
        activate=row.activate,
        max_edits=row.max_edits,
        edit_ids=None if row.edit_ids is None else tuple(row.edit_ids),
        hparams=row.hparams,
        recheck=row.recheck,
        trained_by=row.trained_by,
        trainer_id=row.trainer_id,
        parent_id=row.parent_id,
        version_id=row.version_id,
        edits=row.edits,
        progress=None if row.progress is None else Progress.model_validate(row.progress),
        metrics=row.metrics,
        seconds=row.seconds,
        error=row.error,
        created_at=row.created_at,
        updated_at=row.updated_at,
        finished_at=row.finished_at,
    )
