"""The one way an edit changes its state or its version: a guarded UPDATE and a row of history."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Text, any_, bindparam, func, insert, literal, select
from sqlalchemy import update as update_
from sqlalchemy.ext.asyncio import AsyncConnection

from service.edits import EDIT_TRANSITIONS, EditState
from service.store.tables import edit_events, edits

CURRENT = (EditState.QUEUED, EditState.CLAIMED, EditState.APPLIED)
"""The states in which an edit speaks for its fact."""


async def move(
    conn: AsyncConnection,
    before: EditState,
    after: EditState,
    which: ColumnElement[bool],
    *,
    detail: str | None = None,
    **changes: Any,
) -> int:
    """Move those of `which` that are in `before` to `after`; how many."""
    assert after in EDIT_TRANSITIONS[before], f"{before} never becomes {after}"
    return await _update(conn, before, which, detail, state=after, **changes)


async def note(
    conn: AsyncConnection,
    state: EditState,
    which: ColumnElement[bool],
    *,
    detail: str,
    **changes: Any,
) -> int:
    """Record something of those of `which` that are in `state` and stay in it; how many."""
    return await _update(conn, state, which, detail, **changes)


def among(column: ColumnElement[Any], values: Iterable[Any]) -> ColumnElement[bool]:
    """Whether `column` is one of `values`, however many, as one parameter."""
    return column == any_(bindparam(None, list(values), ARRAY(column.type)))


async def _update(
    conn: AsyncConnection,
    before: EditState,
    which: ColumnElement[bool],
    detail: str | None,
    **changes: Any,
) -> int:
    changed = (
        update_(edits)
        .where(edits.c.state == before, which)
        .values(updated_at=func.now(), **changes)
        .returning(edits.c.id, edits.c.state, edits.c.job_id, edits.c.version_id)
        .cte("changed")
    )
    columns = [changed.c.id, changed.c.state, changed.c.job_id, changed.c.version_id]
    result = await conn.execute(
        insert(edit_events).from_select(
            ["edit_id", "state", "job_id", "version_id", "detail"],
            select(*columns, literal(detail, Text)),
        )
    )
    return result.rowcount
