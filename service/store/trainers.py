"""Queries on who trains a job: at most one process, whose id is in the job's row.

A leader takes a job from whoever had it. A runner, which no lock stands for, has a lease, by the
database's clock; another takes the job once that has lapsed.
"""

from datetime import datetime

from sqlalchemy import ColumnElement, and_, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Conflict
from service.jobs import FINISHED, UNTRAINED, Job, Trainer
from service.store.jobs import LEASE, get, of_row
from service.store.tables import jobs
from workers.contract import Progress


async def take(conn: AsyncConnection, job: Job, trainer_id: str) -> Job:
    """Make `trainer_id` the job's trainer; `Conflict` if it is not as it was seen any more."""
    taken = await conn.execute(
        update(jobs)
        .where(
            jobs.c.id == job.id,
            jobs.c.state == job.state,
            jobs.c.trainer_id.is_not_distinct_from(job.trainer_id),
        )
        .values(trainer_id=trainer_id)
        .returning(jobs)
    )
    row = taken.one_or_none()
    if row is None:
        raise Conflict(f"job {job.id} was taken by another leader")
    return of_row(row)


async def take_abandoned(conn: AsyncConnection, runner_id: str) -> Job | None:
    """The oldest untrained job whose runner's lease has lapsed, now `runner_id`'s; None if none."""
    abandoned = (
        select(jobs.c.id)
        .where(_runners(), jobs.c.lease_until < func.now())
        .order_by(jobs.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    taken = await conn.execute(
        update(jobs)
        .where(jobs.c.id == abandoned.scalar_subquery())
        .values(trainer_id=runner_id, lease_until=func.now() + LEASE)
        .returning(jobs)
    )
    row = taken.one_or_none()
    return None if row is None else of_row(row)


async def leases(conn: AsyncConnection) -> dict[str, datetime]:
    """Until when runners hold the jobs that they have yet to train, by job."""
    found = await conn.execute(select(jobs.c.id, jobs.c.lease_until).where(_runners()))
    return {row.id: row.lease_until for row in found}


async def renew(conn: AsyncConnection, job_id: str, runner_id: str) -> None:
    """Extend a runner's lease; `Conflict` if another has taken the job, or it has ended."""
    renewed = await conn.execute(
        update(jobs)
        .where(_runners(), jobs.c.id == job_id, jobs.c.trainer_id == runner_id)
        .values(lease_until=func.now() + LEASE)
    )
    if renewed.rowcount == 0:
        await _check_held(conn, job_id, runner_id)


async def let_go(conn: AsyncConnection, job_id: str, runner_id: str) -> None:
    """End a runner's lease, if it has one, so that another need not wait for its end."""
    await conn.execute(
        update(jobs)
        .where(_runners(), jobs.c.id == job_id, jobs.c.trainer_id == runner_id)
        .values(lease_until=func.now())
    )


async def abandoned_s(conn: AsyncConnection, job_id: str) -> float:
    """For how many seconds a runner's job has had no runner; negative while it has one."""
    since = func.extract("epoch", func.now() - jobs.c.lease_until)
    return float((await conn.execute(select(since).where(jobs.c.id == job_id))).scalar_one())


async def record_progress(
    conn: AsyncConnection, job_id: str, trainer_id: str, progress: Progress
) -> None:
    """Where training stands; `Conflict` if another trains the job by now, or it has ended."""
    recorded = await conn.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.trainer_id == trainer_id, jobs.c.finished_at.is_(None))
        .values(progress=progress.model_dump(mode="json"), updated_at=func.now())
    )
    if recorded.rowcount == 0:
        await _check_held(conn, job_id, trainer_id)


async def _check_held(conn: AsyncConnection, job_id: str, trainer_id: str) -> None:
    job = await get(conn, job_id)
    if job.trainer_id != trainer_id:
        raise Conflict(f"job {job_id} was taken by another trainer")
    if job.state in FINISHED:
        raise Conflict(f"job {job_id} is {job.state}: {job.error}")


def _runners() -> ColumnElement[bool]:
    return and_(jobs.c.trained_by == Trainer.RUNNER, jobs.c.state.in_(sorted(UNTRAINED)))
