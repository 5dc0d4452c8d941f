"""Answers kept by idempotency key, so that a repeated request gets the first one's answer."""

import hashlib
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Conflict
from service.store.tables import idempotency_keys

KEPT_FOR = timedelta(hours=24)


async def once(
    conn: AsyncConnection,
    *,
    key: str,
    route: str,
    body: bytes,
    work: Callable[[], Awaitable[dict[str, Any]]],
) -> dict[str, Any]:
    """Do `work` in the caller's transaction and keep its answer (JSON), or return the one kept.

    A request with the same key at the same time waits for the first one's transaction. `Conflict`
    if the key came with another body before. Answers are kept for a day; failures are not kept.
    """
    table, digest = idempotency_keys, hashlib.sha256(body).digest()
    this = (table.c.key == key) & (table.c.route == route)
    await conn.execute(delete(table).where(table.c.created_at < func.now() - KEPT_FOR, this))
    first = await conn.execute(
        upsert(table).values(key=key, route=route, body_sha256=digest).on_conflict_do_nothing()
    )
    if first.rowcount:
        answer = await work()
        await conn.execute(update(table).where(this).values(answer=answer))
        return answer
    kept = (await conn.execute(select(table.c.body_sha256, table.c.answer).where(this))).one()
    if kept.body_sha256 != digest:
        raise Conflict(f"Idempotency-Key {key!r} was used before with another body")
    return dict(kept.answer)


async def prune(conn: AsyncConnection) -> int:
    """Forget the answers that are no longer kept; how many."""
    result = await conn.execute(
        delete(idempotency_keys).where(idempotency_keys.c.created_at < func.now() - KEPT_FOR)
    )
    return result.rowcount
