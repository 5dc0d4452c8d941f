"""Queries on replicas: who is there, what each holds, what each acknowledged.

Time is the database's, never a replica's.
"""

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, func, literal, not_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Conflict
from service.store.edit_states import among
from service.store.tables import acknowledgements, replicas, serving
from service.versions import BASE_VERSION, ReplicaState, ReplicaStatus, StagedVersion

CHANNEL = "errata_replicas"
"""Notified when a replica joined, left or acknowledged a version."""


async def join(
    conn: AsyncConnection,
    replica_id: str,
    resident: Sequence[str],
    refused: Collection[str] = (),
    *,
    cluster: str = "",
) -> bool:
    """Take a replica in (or back, after a fence), if it holds what is or is about to be served.

    False: something of that is not in `resident`; load it and try again. A version that is only
    being staged, or a canary, may be among `refused` instead: it fails verification, and the
    replica, once it has joined, acknowledges that. `cluster` names the Ray cluster that runs it.
    """
    query = select(serving.c.version_id, serving.c.staging_id, serving.c.canary_id)
    now = (await conn.execute(query.with_for_update(read=True))).one_or_none()
    if now is None:
        return False
    if now.version_id not in {*resident, BASE_VERSION}:
        return False
    if not {now.staging_id, now.canary_id} <= {*resident, BASE_VERSION, *refused, None}:
        return False
    row = {"state": ReplicaState.READY, "resident": list(resident), "cluster": cluster}
    await conn.execute(
        upsert(replicas)
        .values(id=replica_id, **row)
        .on_conflict_do_update(
            index_elements=[replicas.c.id], set_={**row, "heartbeat_at": func.clock_timestamp()}
        )
    )
    await _notify(conn, replica_id)
    return True


async def heartbeat(
    conn: AsyncConnection, replica_id: str, resident: Sequence[str]
) -> ReplicaState | None:
    """Renew a replica's lease; FENCED tells it to stop serving, None that it is not known."""
    result = await conn.execute(
        update(replicas)
        .where(replicas.c.id == replica_id)
        .values(resident=list(resident), heartbeat_at=func.clock_timestamp())
        .returning(replicas.c.state)
    )
    state: ReplicaState | None = result.scalar_one_or_none()
    return state


async def acknowledge(
    conn: AsyncConnection,
    replica_id: str,
    version_id: str,
    digest: str | None = None,
    error: str | None = None,
) -> None:
    """Record that a replica loaded a version (its digest) or why it could not (`error`).

    `Conflict` if the replica has not joined.
    """
    known = select(
        replicas.c.id, literal(version_id), literal(digest), literal(error), func.clock_timestamp()
    ).where(replicas.c.id == replica_id)
    columns = ["replica_id", "version_id", "digest", "error", "staged_at"]
    statement = upsert(acknowledgements).from_select(columns, known)
    result = await conn.execute(
        statement.on_conflict_do_update(
            index_elements=["replica_id", "version_id"],
            set_={name: statement.excluded[name] for name in columns[2:]},
        )
    )
    if result.rowcount == 0:
        raise Conflict(f"replica {replica_id} has not joined")
    await _notify(conn, replica_id)


async def live(conn: AsyncConnection, lease_s: float) -> list[ReplicaStatus]:
    """The replicas that may serve: a fresh heartbeat and no fence."""
    return [one for one in await seen(conn, lease_s) if one.state is ReplicaState.READY]


async def seen(conn: AsyncConnection, lease_s: float) -> list[ReplicaStatus]:
    """The replicas with a heartbeat within `lease_s`, fenced ones too."""
    found = await conn.execute(select(replicas).where(_fresh(lease_s)).order_by(replicas.c.id))
    rows = found.all()
    staged: dict[str, list[StagedVersion]] = {row.id: [] for row in rows}
    for ack in await conn.execute(
        select(acknowledgements)
        .where(among(acknowledgements.c.replica_id, staged))
        .order_by(acknowledgements.c.staged_at)
    ):
        staged[ack.replica_id].append(
            StagedVersion(ack.version_id, ack.digest, ack.error, ack.staged_at)
        )
    return [
        ReplicaStatus(
            row.id,
            row.cluster,
            row.state,
            tuple(row.resident),
            tuple(staged[row.id]),
            row.heartbeat_at,
        )
        for row in rows
    ]


async def fence(conn: AsyncConnection, replica_id: str) -> None:
    """Bar a replica from serving until it has joined again."""
    await _fence(conn, replicas.c.id == replica_id)


async def leave(conn: AsyncConnection, replica_id: str) -> None:
    """Forget a replica that ends."""
    await conn.execute(delete(replicas).where(replicas.c.id == replica_id))
    await _notify(conn, replica_id)


async def prune(conn: AsyncConnection, older_than_s: float) -> int:
    """Forget the replicas without a heartbeat for so long; how many.

    But for those that a rollout looks at: it locks them in another order.
    """
    late = select(replicas.c.id).where(not_(_fresh(older_than_s))).with_for_update(skip_locked=True)
    result = await conn.execute(delete(replicas).where(replicas.c.id.in_(late)))
    return result.rowcount


async def forget(conn: AsyncConnection, version_id: str) -> None:
    """Drop every acknowledgement of a version: a rollout begins, and each must load it anew."""
    await conn.execute(delete(acknowledgements).where(acknowledgements.c.version_id == version_id))


async def require_staged(
    conn: AsyncConnection, version_id: str, replica_ids: Sequence[str]
) -> None:
    """`Conflict` unless each of `replica_ids` loaded the version; fences others without it.

    See `serving.commit`, whose lock keeps replicas from joining meanwhile.
    """
    good = (acknowledgements.c.version_id == version_id) & acknowledgements.c.digest.is_not(None)
    rows = await conn.execute(
        select(replicas.c.id, replicas.c.resident)
        .where(replicas.c.state == ReplicaState.READY)
        .order_by(replicas.c.id)
        .with_for_update()
    )
    resident = {row.id: {*row.resident, BASE_VERSION} for row in rows}
    acks = await conn.execute(
        select(acknowledgements.c.replica_id, acknowledgements.c.digest).where(good)
    )
    digests = {row.replica_id: row.digest for row in acks if row.replica_id in resident}
    if missing := sorted(set(replica_ids) - digests.keys()):
        raise Conflict(f"{version_id} is not staged on {', '.join(missing)}")
    if not digests:
        raise Conflict(f"{version_id} is not staged on any replica")
    if len(set(digests.values())) > 1:
        raise Conflict(f"{version_id} was loaded with different digests: {digests}")
    without = [
        one for one, held in resident.items() if one not in digests and version_id not in held
    ]
    if without:
        await _fence(conn, among(replicas.c.id, without))


async def _notify(conn: AsyncConnection, replica_id: str) -> None:
    await conn.execute(select(func.pg_notify(CHANNEL, replica_id)))


async def _fence(conn: AsyncConnection, which: ColumnElement[bool]) -> None:
    await conn.execute(update(replicas).where(which).values(state=ReplicaState.FENCED))


def _fresh(lease_s: float) -> ColumnElement[Any]:
    return replicas.c.heartbeat_at > func.clock_timestamp() - timedelta(seconds=lease_s)
