"""What each connection asks of the server: one that is cut off must leave no lock behind."""

import asyncio

import pytest
from sqlalchemy import select, text

from service.errors import Unavailable
from service.store import replicas
from service.store.database import Database, connect, parse_url
from service.store.tables import replicas as table
from tests.tiny_model import register

pytestmark = pytest.mark.anyio

ASKED = "SELECT count(*) FROM pg_settings WHERE source = 'client' AND name LIKE 'tcp\\_%'"


async def test_the_server_is_to_notice_who_is_cut_off(
    database: Database, database_url: str
) -> None:
    async with database.transaction() as pooled:
        assert (await pooled.execute(text(ASKED))).scalar_one() == 4
    async with await connect(parse_url(database_url), answer_s=5) as bare:
        assert await (await bare.execute(ASKED)).fetchone() == (4,)


async def test_a_url_may_say_otherwise(database_url: str) -> None:
    url = f"{database_url}&options=-c%20tcp_keepalives_idle%3D60"
    async with await connect(parse_url(url), answer_s=5) as bare:
        assert await (await bare.execute(ASKED)).fetchone() == (1,)


async def test_a_deadlock_is_to_be_tried_again(database: Database) -> None:
    await register(database, "base")
    async with database.transaction() as conn:
        for replica_id in ("a", "b"):
            assert await replicas.join(conn, replica_id, [])
    both_hold_one = asyncio.Barrier(2)

    async def lock(first: str, second: str) -> None:
        async with database.transaction() as conn:
            await conn.execute(select(table).where(table.c.id == first).with_for_update())
            await both_hold_one.wait()
            await conn.execute(select(table).where(table.c.id == second).with_for_update())

    ended = await asyncio.gather(lock("a", "b"), lock("b", "a"), return_exceptions=True)
    assert {type(one) for one in ended} == {type(None), Unavailable}


async def test_a_replica_that_a_rollout_looks_at_is_not_forgotten(database: Database) -> None:
    await register(database, "base")
    async with database.transaction() as conn:
        for replica_id in ("a", "b"):
            assert await replicas.join(conn, replica_id, [])
    async with database.transaction() as rollout:
        await rollout.execute(select(table).where(table.c.id == "a").with_for_update())
        async with database.transaction() as conn:
            assert await replicas.prune(conn, older_than_s=0) == 1
