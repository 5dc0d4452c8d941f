"""Queries on earlier edits: those that the version a job starts from holds already.

An earlier edit that a new version does not hold any more is still applied, in its own version,
until the new one goes live; then it is queued again.
"""

from typing import Literal

from sqlalchemy import Text, exists, func, literal, not_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.edits import Edit, EditState
from service.jobs import Job
from service.store.edit_states import give_back, lock_facts
from service.store.edits import of_row
from service.store.tables import edits, job_edits, version_edits, versions


async def sample(
    conn: AsyncConnection, job: Job, purpose: Literal["rehearse", "recheck"], limit: int | None
) -> list[Edit]:
    """At most `limit` (None: all) of the applied edits that the job's parent holds, oldest first.

    None of a fact that the job trains anew. Drawn by the job and the purpose, so that which edits
    are asked again does not depend on which were rehearsed.
    """
    mine = edits.alias()
    anew = exists().where(
        mine.c.fact == edits.c.fact,
        mine.c.id == job_edits.c.edit_id,
        job_edits.c.job_id == job.id,
    )
    drawn = (
        select(edits.c.id)
        .join(version_edits, version_edits.c.edit_id == edits.c.id)
        .where(
            version_edits.c.version_id == job.parent_id,
            version_edits.c.held,
            edits.c.state == EditState.APPLIED,
            not_(anew),
        )
        .order_by(func.md5(literal(f"{job.id} {purpose} ", Text) + edits.c.id))
        .limit(limit)
    )
    found = await conn.execute(select(edits).where(edits.c.id.in_(drawn)).order_by(edits.c.id))
    return [of_row(row) for row in found]


async def give_back_lost(conn: AsyncConnection, version_id: str) -> int:
    """Queue the applied edits that `version_id` was found not to hold; how many.

    Only those applied in a version before it: going back to an older version gives nothing back.
    One whose fact has a later edit is superseded instead.
    """
    own, this = versions.alias(), versions.alias()
    lost = select(version_edits.c.edit_id).where(
        version_edits.c.version_id == version_id, not_(version_edits.c.held)
    )
    number = select(this.c.number).where(this.c.id == version_id).scalar_subquery()
    older = exists().where(own.c.id == edits.c.version_id, own.c.number < number)
    which = edits.c.id.in_(lost) & older
    await lock_facts(conn, select(edits.c.fact).where(edits.c.state == EditState.APPLIED, which))
    verdict = version_edits.alias()
    answered = (
        select(literal(f"{version_id} does not hold it; it answers: ", Text) + verdict.c.answer)
        .where(verdict.c.version_id == version_id, verdict.c.edit_id == edits.c.id)
        .correlate(edits)
        .scalar_subquery()
    )
    return await give_back(conn, EditState.APPLIED, which, detail=answered)
