"""The Idempotency-Key header: the same key and body give the same answer again."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import idempotency


async def answer_once(
    conn: AsyncConnection,
    request: Request,
    key: str | None,
    work: Callable[[], Awaitable[dict[str, Any]]],
) -> dict[str, Any]:
    """The answer of `work`, or the one kept for the request's key; without a key, just `work`."""
    if key is None:
        return await work()
    route = f"{request.method} {request.url.path}"
    return await idempotency.once(conn, key=key, route=route, body=await request.body(), work=work)
