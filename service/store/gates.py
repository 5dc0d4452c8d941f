"""Queries of the gate: which edits to ask a version about, and what was found."""

from sqlalchemy import Text, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.edits import Edit
from service.store.edits import of_row
from service.store.tables import edits, version_edits, versions
from service.versions import GateFinding


async def sample(conn: AsyncConnection, version_id: str, limit: int) -> list[Edit]:
    """At most `limit` of the edits that were reliable in a version when it was evaluated."""
    found = await conn.execute(
        select(edits)
        .join(version_edits, version_edits.c.edit_id == edits.c.id)
        .where(version_edits.c.version_id == version_id, version_edits.c.reliable)
        .order_by(func.md5(literal(f"{version_id} gate ", Text) + edits.c.id))
        .limit(limit)
    )
    return [of_row(row) for row in found]


async def record(conn: AsyncConnection, version_id: str, found: GateFinding) -> None:
    """Keep what was found, for or against a version."""
    await conn.execute(
        update(versions).where(versions.c.id == version_id).values(gate=found.model_dump())
    )
