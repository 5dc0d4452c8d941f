"""Who leads: a PostgreSQL advisory lock, held by a connection for as long as that lives."""

import asyncio
import logging

import psycopg

from service.errors import Unavailable
from service.store.database import Connection, connect, parse_url

COORDINATOR = 0x4C454144  # "LEAD"
CHECK_S = 5.0
"""A lock whose connection does not answer within this time is taken for lost."""
_RETRY_S = 1.0

log = logging.getLogger(__name__)


class Leadership:
    """A lock named `key` that at most one process has; the server frees it if the process dies."""

    def __init__(self, url: str, key: int = COORDINATOR) -> None:
        self._url = parse_url(url)
        self._key = key
        self._conn: Connection | None = None

    async def try_acquire(self) -> bool:
        """Take the lock if it is free; `Unavailable` if the database cannot be reached."""
        if await self.held():
            return True
        try:
            conn = await connect(self._url, CHECK_S)
        except psycopg.OperationalError as error:
            raise Unavailable(f"cannot lead: {error}") from error
        try:
            lock = await conn.execute("SELECT pg_try_advisory_lock(%s)", (self._key,))
            if await lock.fetchone() == (True,):
                self._conn = conn
        except psycopg.OperationalError as error:
            raise Unavailable(f"cannot lead: {error}") from error
        finally:
            if self._conn is not conn:
                await conn.close()
        return self._conn is conn

    async def acquire(self) -> None:
        """Wait for the lock, and for the database if it cannot be reached.

        By asking again: one that waits in the server would be given the lock there even after its
        connection is gone.
        """
        while True:
            try:
                if await self.try_acquire():
                    return
            except Unavailable as error:
                log.warning("%s; trying again", error)
            await asyncio.sleep(_RETRY_S)

    async def held(self) -> bool:
        """Whether the lock is still ours: its connection answers, within 5 s."""
        if self._conn is None:
            return False
        try:
            await self._conn.execute("SELECT 1")
        except psycopg.Error:
            await self.release()
            return False
        return True

    async def release(self) -> None:
        """Give the lock up, if it is ours."""
        conn, self._conn = self._conn, None
        if conn is not None:
            await conn.close()
