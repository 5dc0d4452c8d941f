"""Queries on what a job trains along with its edits: decided once, then read."""

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.jobs import Retention
from service.store.edit_states import among
from service.store.edits import of_row
from service.store.tables import edits, retentions
from workers.contract import Anchor


async def get(conn: AsyncConnection, job_id: str) -> Retention | None:
    """What was recorded for a job, or None if nothing was decided yet."""
    query = select(retentions).where(retentions.c.job_id == job_id)
    row = (await conn.execute(query)).one_or_none()
    if row is None:
        return None
    found = await conn.execute(
        select(edits).where(among(edits.c.id, row.rehearsed)).order_by(edits.c.id)
    )
    return Retention(
        rehearsed=tuple(of_row(edit).record() for edit in found),
        anchors=tuple(Anchor.model_validate(anchor) for anchor in row.anchors),
    )


async def record(conn: AsyncConnection, job_id: str, retention: Retention) -> None:
    """Write it down before the training starts, unless another leader has done so."""
    await conn.execute(
        upsert(retentions)
        .values(
            job_id=job_id,
            rehearsed=[edit.id for edit in retention.rehearsed],
            anchors=[anchor.model_dump() for anchor in retention.anchors],
        )
        .on_conflict_do_nothing()
    )
