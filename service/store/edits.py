"""Queries on edits: storing and reading; what jobs do with them is in `claims`.

Every change of state is an UPDATE guarded by the state before, checked against
`EDIT_TRANSITIONS`, with a row of history. Rows are locked in the order of their ids.
"""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Interval, Row, func, insert, or_, select, type_coerce
from sqlalchemy.ext.asyncio import AsyncConnection

from service.edits import Edit, EditEvent, EditState, NewEdit, fact_key
from service.errors import NotFound
from service.store import cursors
from service.store.claims import claim, release, settle
from service.store.edit_states import CURRENT, among, move
from service.store.ids import new_ids
from service.store.tables import edit_events, edits, job_edits, version_edits
from workers.contract import LocalityProbe

_FACT_LOCKS = 0x45444954  # "EDIT"
_STRIPES = 64

__all__ = [
    "add",
    "claim",
    "count",
    "get",
    "history",
    "of_job",
    "of_row",
    "oldest_queued_age",
    "page",
    "release",
    "settle",
    "spoken_for",
]


async def add(conn: AsyncConnection, new: Sequence[NewEdit]) -> list[Edit]:
    """Store edits as queued, in order; a later edit of the same fact supersedes a queued one.

    Of several edits of one fact in `new` the last is queued, the others are superseded at once.
    """
    if not new:
        return []
    facts = [_digest(edit.prompt) for edit in new]
    await _lock_facts(conn, facts)
    latest = await _supersede_queued(conn, facts)
    last = {fact: place for place, fact in enumerate(facts)}
    # A later edit of a fact has the greater id: `give_back` tells them apart by that.
    ids = await new_ids(conn, "ed", len(new), after=max(latest.values(), default=None))
    rows = []
    for place, (edit_id, fact, edit) in enumerate(zip(ids, facts, new, strict=True)):
        state = EditState.QUEUED if last[fact] == place else EditState.SUPERSEDED
        rows.append(_new_row(edit_id, fact, edit, state, latest.get(fact)))
        latest[fact] = edit_id
    await conn.execute(insert(edits), rows)
    await conn.execute(
        insert(edit_events), [{"edit_id": row["id"], "state": row["state"]} for row in rows]
    )
    stored = await conn.execute(select(edits).where(among(edits.c.id, ids)).order_by(edits.c.id))
    return [of_row(row) for row in stored]


async def get(conn: AsyncConnection, edit_id: str) -> Edit:
    row = (await conn.execute(select(edits).where(edits.c.id == edit_id))).one_or_none()
    if row is None:
        raise NotFound(f"no edit {edit_id}")
    return of_row(row)


async def history(conn: AsyncConnection, edit_id: str) -> list[EditEvent]:
    """What happened to an edit, oldest first."""
    found = await conn.execute(
        select(edit_events).where(edit_events.c.edit_id == edit_id).order_by(edit_events.c.id)
    )
    return [EditEvent(row.at, row.state, row.job_id, row.version_id, row.detail) for row in found]


async def page(
    conn: AsyncConnection,
    *,
    state: EditState | None = None,
    version_id: str | None = None,
    job_id: str | None = None,
    q: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> tuple[list[Edit], str | None]:
    """Edits newest first and the cursor of the next page.

    `version_id` selects what the version holds, `job_id` what the job claimed, `q` a text in the
    prompt, the target or the subject.
    """
    query = select(edits).order_by(edits.c.id.desc()).limit(limit + 1)
    if state is not None:
        query = query.where(edits.c.state == state)
    if version_id is not None:
        query = query.where(
            edits.c.id.in_(
                select(version_edits.c.edit_id).where(
                    version_edits.c.version_id == version_id, version_edits.c.held
                )
            )
        )
    if job_id is not None:
        query = query.where(
            edits.c.id.in_(select(job_edits.c.edit_id).where(job_edits.c.job_id == job_id))
        )
    if q is not None:
        text = [edits.c.prompt, edits.c.target, edits.c.subject]
        query = query.where(or_(*(column.icontains(q, autoescape=True) for column in text)))
    if cursor is not None:
        query = query.where(edits.c.id < cursors.decode(cursor))
    found = [of_row(row) for row in await conn.execute(query)]
    return cursors.split(found, [edit.id for edit in found], limit)


async def count(conn: AsyncConnection, state: EditState) -> int:
    query = select(func.count()).select_from(edits).where(edits.c.state == state)
    return int((await conn.execute(query)).scalar_one())


async def oldest_queued_age(conn: AsyncConnection) -> timedelta | None:
    """How long the edit that has waited longest has waited, by the database's clock."""
    age = type_coerce(func.now() - edits.c.created_at, Interval)
    query = select(age).where(edits.c.state == EditState.QUEUED)
    return (await conn.execute(query.order_by(edits.c.id).limit(1))).scalar_one_or_none()


async def of_job(conn: AsyncConnection, job_id: str) -> list[Edit]:
    """Every edit a job claimed or keeps, oldest first."""
    found = await conn.execute(
        select(edits)
        .join(job_edits, job_edits.c.edit_id == edits.c.id)
        .where(job_edits.c.job_id == job_id)
        .order_by(edits.c.id)
    )
    return [of_row(row) for row in found]


async def spoken_for(conn: AsyncConnection, prompts: Iterable[str]) -> set[str]:
    """Those of `prompts` whose fact a queued, claimed or applied edit changes."""
    facts = {prompt: _digest(prompt) for prompt in prompts}
    found = await conn.execute(
        select(edits.c.fact).where(
            among(edits.c.fact, set(facts.values())), edits.c.state.in_(CURRENT)
        )
    )
    changed = set(found.scalars())
    return {prompt for prompt, fact in facts.items() if fact in changed}


async def _lock_facts(conn: AsyncConnection, facts: Sequence[bytes]) -> None:
    """Let calls about the same fact follow one another; a bounded number of locks, in order."""
    for stripe in sorted({fact[0] % _STRIPES for fact in facts}):
        await conn.execute(select(func.pg_advisory_xact_lock(_FACT_LOCKS, stripe)))


async def _supersede_queued(conn: AsyncConnection, facts: Sequence[bytes]) -> dict[bytes, str]:
    """Supersede what is queued for `facts`; the latest edit of each that is not yet an end."""
    found = (
        await conn.execute(
            select(edits.c.id, edits.c.fact, edits.c.state)
            .where(among(edits.c.fact, set(facts)), edits.c.state.in_(CURRENT))
            .order_by(edits.c.id)
            .with_for_update()
        )
    ).all()
    queued = [row.id for row in found if row.state == EditState.QUEUED]
    if queued:
        await move(
            conn,
            EditState.QUEUED,
            EditState.SUPERSEDED,
            among(edits.c.id, queued),
            detail="a later edit of the same fact was stored",
        )
    return {row.fact: row.id for row in found}


def _digest(prompt: str) -> bytes:
    return hashlib.sha256(fact_key(prompt).encode()).digest()


def _new_row(
    edit_id: str, fact: bytes, edit: NewEdit, state: EditState, supersedes: str | None
) -> dict[str, Any]:
    return {
        "id": edit_id,
        "fact": fact,
        "prompt": edit.prompt,
        "target": edit.target,
        "subject": edit.subject,
        "rephrases": list(edit.rephrases),
        "locality": [probe.model_dump() for probe in edit.locality],
        "metadata": edit.metadata,
        "state": state,
        "supersedes": supersedes,
    }


def of_row(row: Row[Any]) -> Edit:
    """The edit in a row of `edits`, with all its columns."""
    return Edit(
        id=row.id,
        prompt=row.prompt,
        target=row.target,
        subject=row.subject,
        rephrases=tuple(row.rephrases),
        locality=tuple(LocalityProbe.model_validate(probe) for probe in row.locality),
        metadata=row.metadata,
        state=row.state,
        supersedes=row.supersedes,
        job_id=row.job_id,
        version_id=row.version_id,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
