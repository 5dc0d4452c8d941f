"""The one row that decides what is served: request a rollout, commit it, or abandon it.

Each of them locks the row first, so they follow one another, and a replica that joins sees either
the state before or the state after. The generation only grows (a trigger holds that too).
"""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Conflict, Unavailable
from service.store import earlier, replicas, versions
from service.store.tables import serving
from service.versions import Serving, VersionState

CHANNEL = "errata_serving"
"""Notified at every change with `{"generation", "version_id", "staging_id"}`."""


async def current(conn: AsyncConnection) -> Serving:
    """What is served; `Unavailable` before the base model was registered."""
    return await _read(conn)


async def request(conn: AsyncConnection, version_id: str) -> Serving:
    """Ask for a rollout of `version_id`; nothing to do if it is live or being rolled out.

    `NotFound` for an unknown version; `Conflict` for a rejected one or during another rollout.
    """
    now = await _read(conn, lock=True)
    version = await versions.get(conn, version_id)
    if now.staging_id not in (None, version_id):
        raise Conflict(f"{now.staging_id} is being rolled out; wait for its end, then ask again")
    if version_id in (now.version_id, now.staging_id):
        return now
    if version.state is VersionState.REJECTED:
        raise Conflict(f"{version_id} was rejected: {version.error}")
    await versions.move(conn, version_id, VersionState.STAGING)
    # Only what is loaded from now on counts.
    await replicas.forget(conn, version_id)
    return await _write(conn, staging_id=version_id)


async def commit(
    conn: AsyncConnection,
    version_id: str,
    expected_generation: int,
    replica_ids: Sequence[str],
) -> Serving:
    """Make `version_id` the live version and increment the generation, in one transaction.

    Each of `replica_ids` must be unfenced and have loaded it, all with the same digest, and there
    must be one; else `Conflict`. Any other replica that does not hold it is fenced, so that one
    that was away cannot serve before it joins again. `Conflict`, too, if `expected_generation`
    has passed or `version_id` is not being rolled out. Earlier edits that it was found not to hold
    are queued again.
    """
    now = await _read(conn, lock=True)
    if now.generation != expected_generation:
        raise Conflict(f"the serving generation is {now.generation}, not {expected_generation}")
    if now.staging_id != version_id:
        raise Conflict(f"{version_id} is not being rolled out; {now.staging_id or 'nothing'} is")
    await replicas.require_staged(conn, version_id, replica_ids)
    await versions.move(conn, now.version_id, VersionState.RETIRED)
    version = await versions.get(conn, version_id)
    if version.state is VersionState.STAGING:
        await versions.move(conn, version_id, VersionState.STAGED)
    await versions.move(conn, version_id, VersionState.LIVE)
    await earlier.give_back_lost(conn, version_id)
    return await _write(conn, generation=now.generation + 1, version_id=version_id, staging_id=None)


async def abandon(
    conn: AsyncConnection, version_id: str, *, error: str | None, rejected: bool
) -> Serving:
    """Give up the rollout of `version_id`; what is live stays.

    The version is rejected, or is again what it was before. `Conflict` if it is not being
    rolled out.
    """
    now = await _read(conn, lock=True)
    if now.staging_id != version_id:
        raise Conflict(f"{version_id} is not being rolled out; {now.staging_id or 'nothing'} is")
    if rejected:
        await versions.move(conn, version_id, VersionState.REJECTED, error)
    else:
        await versions.settle_back(conn, version_id, error)
    return await _write(conn, staging_id=None)


async def _read(conn: AsyncConnection, *, lock: bool = False) -> Serving:
    query = select(serving)
    row = (await conn.execute(query.with_for_update() if lock else query)).one_or_none()
    if row is None:
        raise Unavailable("nothing is served yet: the base model is not registered")
    return Serving(row.generation, row.version_id, row.staging_id, row.updated_at)


async def _write(conn: AsyncConnection, **changes: Any) -> Serving:
    await conn.execute(update(serving).values(updated_at=func.now(), **changes))
    now = await _read(conn)
    payload = {
        "generation": now.generation,
        "version_id": now.version_id,
        "staging_id": now.staging_id,
    }
    await conn.execute(select(func.pg_notify(CHANNEL, json.dumps(payload))))
    return now
