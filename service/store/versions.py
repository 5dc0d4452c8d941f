"""Queries on versions: what exists, what each holds, where each stands."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Row, delete, func, insert, literal, select, true, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import ConfigurationError, Conflict, NotFound
from service.store import cursors
from service.store.edit_states import among
from service.store.tables import serving, version_edits, version_numbers, versions
from service.versions import (
    BASE_VERSION,
    VERSION_TRANSITIONS,
    GateFinding,
    Verdict,
    Version,
    VersionState,
)

ROWS_AT_ONCE = 1000


async def ensure_base(conn: AsyncConnection, fingerprint: str) -> None:
    """Make the base model version v0 and serve it, unless that was done before.

    `ConfigurationError` if the store belongs to a base model with another fingerprint.
    """
    await conn.execute(
        upsert(versions)
        .values(id=BASE_VERSION, number=0, state=VersionState.LIVE, base_fingerprint=fingerprint)
        .on_conflict_do_nothing()
    )
    await conn.execute(
        upsert(serving).values(generation=1, version_id=BASE_VERSION).on_conflict_do_nothing()
    )
    stored = (await get(conn, BASE_VERSION)).base_fingerprint
    if stored != fingerprint:
        raise ConfigurationError(
            f"the store holds edits of a base model with fingerprint {stored}, but the configured "
            f"model has {fingerprint}; start with the former model, or name another data_dir "
            "or database_url for this one"
        )


async def allocate(conn: AsyncConnection) -> str:
    """The id of a new version, greater than all before; v1 is the first."""
    return f"v{(await conn.execute(select(version_numbers.next_value()))).scalar_one()}"


async def publish(
    conn: AsyncConnection,
    *,
    version_id: str,
    parent_id: str | None,
    job_id: str,
    base_fingerprint: str,
    metrics: Mapping[str, float],
) -> Version:
    """Register a version whose artifact is complete; `Conflict` if it is registered already.

    It holds what its parent holds until `edits.settle`, in the same transaction, records how the
    job's own edits came out.
    """
    created = await conn.execute(
        upsert(versions)
        .values(
            id=version_id,
            number=_number(version_id),
            parent_id=parent_id,
            job_id=job_id,
            state=VersionState.PUBLISHED,
            base_fingerprint=base_fingerprint,
            metrics=dict(metrics),
        )
        .on_conflict_do_nothing()
    )
    if created.rowcount == 0:
        raise Conflict(f"version {version_id} (or one of {job_id}) is published already")
    columns = ["version_id", "edit_id", "held"]
    parents = select(literal(version_id), version_edits.c.edit_id, true()).where(
        version_edits.c.version_id == parent_id, version_edits.c.held
    )
    await conn.execute(upsert(version_edits).from_select(columns, parents))
    return await count_edits(conn, version_id)


async def record_verdicts(
    conn: AsyncConnection, version_id: str, verdicts: Sequence[Verdict]
) -> Version:
    """Write how edits came out in a version; it holds those that are reliable."""
    asked = [verdict.edit_id for verdict in verdicts]
    mine = version_edits.c.version_id == version_id
    await conn.execute(delete(version_edits).where(mine, among(version_edits.c.edit_id, asked)))
    for start in range(0, len(verdicts), ROWS_AT_ONCE):
        rows = [
            {"version_id": version_id, "held": verdict.reliable, **verdict.model_dump()}
            for verdict in verdicts[start : start + ROWS_AT_ONCE]
        ]
        await conn.execute(insert(version_edits), rows)
    return await count_edits(conn, version_id)


async def count_edits(conn: AsyncConnection, version_id: str) -> Version:
    """Bring `Version.edits` up to date with what is recorded as held."""
    held = select(func.count()).where(
        version_edits.c.version_id == version_id, version_edits.c.held
    )
    row = await conn.execute(
        update(versions)
        .where(versions.c.id == version_id)
        .values(edits=held.scalar_subquery())
        .returning(versions)
    )
    return _version(row.one())


async def get(conn: AsyncConnection, version_id: str) -> Version:
    row = (await conn.execute(select(versions).where(versions.c.id == version_id))).one_or_none()
    if row is None:
        raise NotFound(f"no version {version_id}")
    return _version(row)


async def page(
    conn: AsyncConnection,
    *,
    state: VersionState | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> tuple[list[Version], str | None]:
    """Versions newest first and the cursor of the next page."""
    query = select(versions).order_by(versions.c.number.desc()).limit(limit + 1)
    if state is not None:
        query = query.where(versions.c.state == state)
    if cursor is not None:
        after = select(versions.c.number).where(versions.c.id == cursors.decode(cursor))
        query = query.where(versions.c.number < after.scalar_subquery())
    found = [_version(row) for row in await conn.execute(query)]
    return cursors.split(found, [version.id for version in found], limit)


async def verdicts(
    conn: AsyncConnection, version_id: str, *, limit: int = 1000, cursor: str | None = None
) -> tuple[list[Verdict], str | None]:
    """How the edits asked of a version came out, oldest first, and the next page's cursor.

    They are those trained into it, and the earlier ones that were asked again.
    """
    query = (
        select(version_edits)
        .where(version_edits.c.version_id == version_id, version_edits.c.reliable.is_not(None))
        .order_by(version_edits.c.edit_id)
        .limit(limit + 1)
    )
    if cursor is not None:
        query = query.where(version_edits.c.edit_id > cursors.decode(cursor))
    found = [_verdict(row) for row in await conn.execute(query)]
    return cursors.split(found, [verdict.edit_id for verdict in found], limit)


async def latest_verdict(conn: AsyncConnection, edit_id: str) -> tuple[str, Verdict] | None:
    """How an edit came out in the newest version that was asked, and that version's id."""
    query = (
        select(version_edits)
        .join(versions, versions.c.id == version_edits.c.version_id)
        .where(version_edits.c.edit_id == edit_id, version_edits.c.reliable.is_not(None))
        .order_by(versions.c.number.desc())
    )
    row = (await conn.execute(query.limit(1))).one_or_none()
    return None if row is None else (row.version_id, _verdict(row))


async def move(
    conn: AsyncConnection, version_id: str, to: VersionState, error: str | None = None
) -> Version:
    """Change a version's state; `Conflict` unless `VERSION_TRANSITIONS` allows it."""
    before = [state for state, after in VERSION_TRANSITIONS.items() if to in after]
    activated = {"activated_at": func.now()} if to is VersionState.LIVE else {}
    moved = await conn.execute(
        update(versions)
        .where(versions.c.id == version_id, versions.c.state.in_(before))
        .values(state=to, error=error, updated_at=func.now(), **activated)
        .returning(versions)
    )
    row = moved.one_or_none()
    if row is None:
        state = (await get(conn, version_id)).state
        raise Conflict(f"version {version_id} is {state}, which is never followed by {to}")
    return _version(row)


async def settle_back(conn: AsyncConnection, version_id: str, error: str | None) -> Version:
    """Take a version out of a rollout: retired if it was ever live, else published."""
    query = select(versions.c.activated_at).where(versions.c.id == version_id)
    activated_at = (await conn.execute(query)).scalar_one()
    to = VersionState.PUBLISHED if activated_at is None else VersionState.RETIRED
    return await move(conn, version_id, to, error)


def _number(version_id: str) -> int:
    return int(version_id.removeprefix("v"))


def _verdict(row: Row[Any]) -> Verdict:
    return Verdict(
        edit_id=row.edit_id,
        reliable=row.reliable,
        answer=row.answer,
        generalization=row.generalization,
        locality=row.locality,
        formats=row.formats,
    )


def _version(row: Row[Any]) -> Version:
    return Version(
        id=row.id,
        parent_id=row.parent_id,
        job_id=row.job_id,
        state=row.state,
        base_fingerprint=row.base_fingerprint,
        metrics=row.metrics,
        edits=row.edits,
        error=row.error,
        gate=row.gate and GateFinding.model_validate(row.gate),
        activated_at=row.activated_at,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
