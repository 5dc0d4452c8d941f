"""What each connection asks of the server: one that is cut off must leave no lock behind."""

import pytest
from sqlalchemy import text

from service.store.database import Database, connect, parse_url

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
