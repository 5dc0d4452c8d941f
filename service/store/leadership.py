"""Who leads: a PostgreSQL advisory lock, held by a connection for as long as that lives."""

import asyncio
import logging

import psycopg

from service.errors import Unavailable
from service.store.database import connect, parse_url

COORDINATOR = 0x4C454144  # "LEAD"
_CHECK_S = 5.0
_RETRY_S = 1.0

log = logging.getLogger(__name__)


class Leadership:
    """A lock named `key` that at most one process has; the server frees it if the process dies."""

    def __init__(self, url: str, key: int = COORDINATOR) -> None:
        self._url = parse_url(url)
        self._key = key
        self._conn: psycopg.AsyncConnection[tuple[object, ...]] | None = None

    async def try_acquire(self) -> bool:
        """Take the lock if it is free; `Unavailable` if the database cannot be reached."""
        return await self._lock("SELECT pg_try_advisory_lock(%s)")

    async def acquire(self) -> None:
        """Wait for the lock, and for the database if it cannot be reached."""
        while True:
            try:
                await self._lock("SELECT true FROM (SELECT pg_advisory_lock(%s)) AS locked")
            except Unavailable as error:
                log.warning("%s; trying again", error)
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def held(self) -> bool:
        """Whether the lock is still ours: its connection answers."""
        if self._conn is None:
            return False
        try:
            async with asyncio.timeout(_CHECK_S):
                await self._conn.execute("SELECT 1")
        except (psycopg.Error, TimeoutError):
            await self.release()
            return False
        return True

    async def release(self) -> None:
        """Give the lock up, if it is ours."""
        conn, self._conn = self._conn, None
        if conn is not None:
            await conn.close()

    async def _lock(self, statement: str) -> bool:
        if await self.held():
            return True
        try:
            conn = await connect(self._url)
        except psycopg.OperationalError as error:
            raise Unavailable(f"cannot lead: {error}") from error
        try:
            locked = await (await conn.execute(statement, (self._key,))).fetchone()
            if locked and locked[0]:
                self._conn = conn
        except psycopg.OperationalError as error:
            raise Unavailable(f"cannot lead: {error}") from error
        finally:
            if self._conn is not conn:
                await conn.close()
        return self._conn is conn
