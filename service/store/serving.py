"""The one row that decides what is served: request a rollout, commit it, or abandon it.

Each of them locks the row first, so they follow one another, and a replica that joins sees either
the state before or the state after. The generation only grows (a trigger holds that too).
"""

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Float, Row, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Conflict, Unavailable
from service.store import earlier, replicas, versions
from service.store.tables import serving
from service.store.tables import versions as versions_table
from service.versions import Canary, Serving, VersionState

CHANNEL = "errata_serving"
"""Notified at every change of what is staged or served; `announced` reads it."""

_JSON = TypeAdapter(Serving)
_NO_STAGING = {"staging_id": None, "staging_percent": None, "staging_promote_after_s": None}
_NO_CANARY = {"canary_id": None, "canary_percent": None, "canary_promote_at": None}


async def current(conn: AsyncConnection) -> Serving:
    """What is served; `Unavailable` before the base model was registered."""
    return _serving(await _row(conn))


async def request(
    conn: AsyncConnection,
    version_id: str,
    *,
    percent: float | None = None,
    promote_after_s: float | None = None,
) -> Serving:
    """Ask for a rollout of `version_id`, or for `percent` of the queries as a canary.

    A canary is promoted by itself after `promote_after_s`, if the gate lets it pass. Asked of the
    live version, it ends a canary: the roll back. Nothing to do if it is so already or under way.
    `NotFound` for an unknown version; `Conflict` for a rejected one, during another rollout, and
    for a second canary.
    """
    row = await _row(conn, lock=True)
    now = _serving(row)
    version = await versions.get(conn, version_id)
    asked = (version_id, percent, promote_after_s)
    if now.staging_id is not None:
        if asked == (row.staging_id, row.staging_percent, row.staging_promote_after_s):
            return now
        raise Conflict(f"{now.staging_id} is being rolled out; wait for its end, then ask again")
    if version_id == now.version_id:
        return await _end_canary(conn, now, percent)
    if version.state is VersionState.REJECTED:
        raise Conflict(f"{version_id} was rejected: {version.error}")
    if percent is not None and now.canary and now.canary.version_id != version_id:
        other = now.canary.version_id
        raise Conflict(
            f"{other} is the canary; promote it, or roll it back by activating {now.version_id}"
        )
    await versions.move(conn, version_id, VersionState.STAGING)
    # Only what is loaded from now on counts.
    await replicas.forget(conn, version_id)
    return await _write(
        conn,
        staging_id=version_id,
        staging_percent=percent,
        staging_promote_after_s=promote_after_s,
    )


async def staged(
    conn: AsyncConnection, version_id: str, expected_generation: int, replica_ids: Sequence[str]
) -> None:
    """Every one of `replica_ids` holds `version_id`: it may be asked, and then committed.

    Conditions and errors are those of `commit`.
    """
    await _require_staged(conn, version_id, expected_generation, replica_ids)
    await _move_to_staged(conn, version_id)


async def commit(
    conn: AsyncConnection,
    version_id: str,
    expected_generation: int,
    replica_ids: Sequence[str],
) -> Serving:
    """Make `version_id` the live version or the canary, as it was asked for, in one transaction.

    The generation is incremented. Each of `replica_ids` must be unfenced and have loaded it, all
    with the same digest, and there must be one; else `Conflict`. Any other replica that does not
    hold it is fenced, so that one that was away cannot serve before it joins again. `Conflict`,
    too, if `expected_generation` has passed or `version_id` is not being rolled out. Earlier edits
    that a version gone live was found not to hold are queued again.
    """
    row = await _require_staged(conn, version_id, expected_generation, replica_ids)
    now = _serving(row)
    await _move_to_staged(conn, version_id)
    changes: dict[str, Any] = {"generation": now.generation + 1, **_NO_STAGING}
    if row.staging_percent is not None:
        after_s = literal(row.staging_promote_after_s, Float)
        after = func.make_interval(0, 0, 0, 0, 0, 0, after_s)
        changes |= {
            "canary_id": version_id,
            "canary_percent": row.staging_percent,
            "canary_promote_at": func.clock_timestamp() + after,
        }
        return await _write(conn, **changes)
    await versions.move(conn, now.version_id, VersionState.RETIRED)
    await versions.move(conn, version_id, VersionState.LIVE)
    await earlier.give_back_lost(conn, version_id)
    if now.canary and now.canary.version_id == version_id:
        changes |= _NO_CANARY
    return await _write(conn, version_id=version_id, **changes)


async def abandon(
    conn: AsyncConnection, version_id: str, *, error: str | None, rejected: bool
) -> Serving:
    """Give up the rollout of `version_id`; what is live stays.

    The version is rejected, and no longer a canary; or else it is again what it was before.
    `Conflict` if it is not being rolled out.
    """
    now = _serving(await _row(conn, lock=True))
    if now.staging_id != version_id:
        raise Conflict(f"{version_id} is not being rolled out; {now.staging_id or 'nothing'} is")
    if rejected:
        return await _reject(conn, now, version_id, error)
    if now.canary and now.canary.version_id == version_id:
        await _move_to_staged(conn, version_id)
    else:
        await versions.settle_back(conn, version_id, error)
    return await _write(conn, **_NO_STAGING)


async def reject_canary(conn: AsyncConnection, version_id: str, error: str) -> Serving:
    """End a canary that must not go on; `Conflict` if it is not the canary, or being rolled out."""
    now = _serving(await _row(conn, lock=True))
    if now.canary is None or version_id != now.canary.version_id or now.staging_id is not None:
        raise Conflict(f"{version_id} is not the canary any more, or a rollout is under way")
    return await _reject(conn, now, version_id, error)


async def promotion_due(conn: AsyncConnection) -> str | None:
    """The canary whose time has come, by the database's clock."""
    due = (serving.c.canary_promote_at <= func.clock_timestamp()) & serving.c.staging_id.is_(None)
    found = await conn.execute(select(serving.c.canary_id).where(due))
    version_id: str | None = found.scalar_one_or_none()
    return version_id


async def _require_staged(
    conn: AsyncConnection, version_id: str, expected_generation: int, replica_ids: Sequence[str]
) -> Row[Any]:
    row = await _row(conn, lock=True)
    if row.generation != expected_generation:
        raise Conflict(f"the serving generation is {row.generation}, not {expected_generation}")
    if row.staging_id != version_id:
        raise Conflict(f"{version_id} is not being rolled out; {row.staging_id or 'nothing'} is")
    await replicas.require_staged(conn, version_id, replica_ids)
    return row


async def _move_to_staged(conn: AsyncConnection, version_id: str) -> None:
    if (await versions.get(conn, version_id)).state is VersionState.STAGING:
        await versions.move(conn, version_id, VersionState.STAGED)


async def _end_canary(conn: AsyncConnection, now: Serving, percent: float | None) -> Serving:
    if percent is not None:
        raise Conflict(f"{now.version_id} is live; a canary is another version than the live one")
    if now.canary is None:
        return now
    await versions.settle_back(conn, now.canary.version_id, None)
    return await _write(conn, generation=now.generation + 1, **_NO_CANARY)


async def _reject(
    conn: AsyncConnection, now: Serving, version_id: str, error: str | None
) -> Serving:
    await versions.move(conn, version_id, VersionState.REJECTED, error)
    changes: dict[str, Any] = dict(_NO_STAGING)
    if now.canary and now.canary.version_id == version_id:
        changes |= {"generation": now.generation + 1, **_NO_CANARY}
    return await _write(conn, **changes)


async def _row(conn: AsyncConnection, *, lock: bool = False) -> Row[Any]:
    if lock:
        # Alone: a locking join that had to wait finds no row once the version has changed.
        await conn.execute(select(serving.c.id).with_for_update())
    query = select(serving, versions_table.c.parent_id).join(
        versions_table, versions_table.c.id == serving.c.version_id
    )
    row = (await conn.execute(query)).one_or_none()
    if row is None:
        raise Unavailable("nothing is served yet: the base model is not registered")
    return row


def _serving(row: Row[Any]) -> Serving:
    canary = None
    if row.canary_id is not None:
        canary = Canary(row.canary_id, row.canary_percent, row.canary_promote_at)
    return Serving(
        row.generation,
        row.version_id,
        row.parent_id,
        row.staging_id,
        row.staging_percent,
        canary,
        row.updated_at,
    )


async def _write(conn: AsyncConnection, **changes: Any) -> Serving:
    await conn.execute(update(serving).values(updated_at=func.clock_timestamp(), **changes))
    now = await current(conn)
    await conn.execute(select(func.pg_notify(CHANNEL, _JSON.dump_json(now).decode())))
    return now


def announced(payload: str) -> Serving:
    """What was told on `CHANNEL`."""
    return _JSON.validate_json(payload)
