"""The backends of a PostgreSQL that the tests look for, and end."""

import asyncio

from sqlalchemy import text

from service.store.database import Database

END_LOCK_HOLDERS = text(
    "SELECT pg_terminate_backend(pid, 60000) FROM pg_locks WHERE locktype = 'advisory'"
)
"""Those that hold, or wait for, a lock of the application's; returns once they are gone."""


async def listening(database: Database, lost: int | None = None) -> int:
    """The backend that has finished a LISTEN, once there is one other than `lost`."""
    query = text(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND query ~ '^(LISTEN|SELECT 1)' AND state = 'idle' AND pid <> pg_backend_pid()"
    )
    async with asyncio.timeout(60):
        while True:
            async with database.transaction() as conn:
                found = set((await conn.execute(query)).scalars()) - {lost}
            if found:
                return int(found.pop())
