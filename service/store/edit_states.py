"""The one way an edit changes its state or its version: a guarded UPDATE and a row of history."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Select,
    Text,
    any_,
    bindparam,
    exists,
    func,
    insert,
    literal,
    not_,
    select,
)
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
    detail: str | ColumnElement[str] | None = None,
    **changes: Any,
) -> int:
    """Move those of `which` that are in `before` to `after`; how many.

    `detail` is the same for all, or an expression over the moved row of `edits`.
    """
    assert after in EDIT_TRANSITIONS[before], f"{before} never becomes {after}"
    return await _update(conn, before, which, detail, state=after, **changes)


async def give_back(
    conn: AsyncConnection,
    before: EditState,
    which: ColumnElement[bool],
    *,
    detail: str | ColumnElement[str],
) -> int:
    """Queue those of `which` that are in `before` again; how many.

    One whose fact has a later edit is superseded instead. Their facts are locked by the caller.
    """
    later = edits.alias()
    replaced = exists().where(
        later.c.fact == edits.c.fact, later.c.id > edits.c.id, later.c.state.in_(CURRENT)
    )
    back = {"job_id": None, "version_id": None}
    superseded, again = EditState.SUPERSEDED, EditState.QUEUED
    await move(conn, before, superseded, which & replaced, detail=detail, **back)
    return await move(conn, before, again, which & not_(replaced), detail=detail, **back)


async def lock_facts(conn: AsyncConnection, facts: Select[tuple[bytes]]) -> None:
    """Keep what speaks for `facts` from changing until the transaction ends."""
    await conn.execute(
        select(edits.c.id)
        .where(edits.c.fact.in_(facts), edits.c.state.in_(CURRENT))
        .order_by(edits.c.id)
        .with_for_update(of=edits)
    )


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
    detail: str | ColumnElement[str] | None,
    **changes: Any,
) -> int:
    said = detail if isinstance(detail, ColumnElement) else literal(detail, Text)
    changed = (
        update_(edits)
        .where(edits.c.state == before, which)
        .values(updated_at=func.now(), **changes)
        .returning(
            edits.c.id, edits.c.state, edits.c.job_id, edits.c.version_id, said.label("detail")
        )
        .cte("changed")
    )
    result = await conn.execute(
        insert(edit_events).from_select(
            ["edit_id", "state", "job_id", "version_id", "detail"], select(changed)
        )
    )
    return result.rowcount
