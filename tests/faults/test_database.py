"""A PostgreSQL that is frozen: it takes what is sent and says nothing. Nothing may wait for it."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from service.api.admission import Admission
from service.errors import Unavailable
from service.store import versions
from service.store.database import Database
from service.store.embedded import EmbeddedPostgres
from service.store.leadership import Leadership
from service.store.migrate import upgrade
from tests.backends import listening

pytestmark = pytest.mark.anyio

ANSWER_S = 0.5


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Not pytest's own: PostgreSQL's account must pass through its parents."""
    made = Path(tempfile.mkdtemp(prefix="errata-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def url(directory: Path) -> Iterator[str]:
    """A server of the tests' own; connecting is given up after 2 s, the least there is."""
    server = EmbeddedPostgres(directory)
    url = f"{server.start()}&connect_timeout=2"
    upgrade(url)
    yield url
    server.stop()


@contextmanager
def frozen(directory: Path) -> Iterator[None]:
    lines = (directory / "postgres" / "postmaster.pid").read_text().splitlines()
    first = psutil.Process(int(lines[0]))
    first.suspend()
    # Those of them that end stay zombies for as long as it stands still.
    family = [*first.children(recursive=True), first]
    try:
        for process in family:
            process.suspend()
        yield
    finally:
        for process in family:
            process.resume()


async def fails_within(seconds: float, database: Database) -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable, match="cannot be reached"):
        async with database.transaction() as conn:
            await conn.execute(text("SELECT 1"))
    assert time.monotonic() - started < seconds


async def test_it_is_given_up_in_time_and_found_again(url: str, directory: Path) -> None:
    database = Database(url, answer_s=ANSWER_S)
    async with database.transaction() as conn:
        await conn.execute(text("SELECT 1"))
    with frozen(directory):
        # A pooled connection that is asked, then a new one; then new ones only.
        await fails_within(4, database)
        await asyncio.gather(*(fails_within(3, database) for _ in range(5)))
    async with database.transaction() as conn:
        await conn.execute(text("SELECT 1"))
    await database.dispose()


async def test_a_transaction_that_it_freezes_in_is_given_up(url: str, directory: Path) -> None:
    database = Database(url, answer_s=ANSWER_S)

    async def lose_the_server() -> None:
        async with database.transaction() as conn:
            await conn.execute(text("CREATE TABLE half_done ()"))
            with frozen(directory):
                await conn.execute(text("SELECT 1"))

    with pytest.raises(Unavailable, match="cannot be reached"):
        await lose_the_server()
    async with database.transaction() as conn:
        assert (await conn.execute(text("SELECT to_regclass('half_done')"))).scalar() is None
    await database.dispose()


async def test_it_is_not_blamed_when_this_process_is_late(url: str) -> None:
    database = Database(url, answer_s=ANSWER_S)
    async with database.transaction() as conn:
        asked = asyncio.ensure_future(conn.execute(text("SELECT 1")))
        await asyncio.sleep(0)
        time.sleep(2 * ANSWER_S)  # noqa: ASYNC251  # this is what is tested
        assert (await asked).scalar_one() == 1
    await database.dispose()


async def test_a_long_statement_has_the_time_it_was_given(url: str) -> None:
    database = Database(url, answer_s=5)
    async with database.transaction() as conn:
        await conn.execute(text(f"SELECT pg_sleep({2 * ANSWER_S})"))
    await database.dispose()


async def test_the_leader_knows_that_it_leads_no_more(
    url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.store.leadership.CHECK_S", ANSWER_S)
    leader, other = Leadership(url), Leadership(url)
    await leader.acquire()
    with frozen(directory):
        assert not await leader.held()
        with pytest.raises(Unavailable, match="cannot lead"):
            await other.try_acquire()
    await other.acquire()
    assert not await leader.try_acquire()
    await other.release()


async def test_who_listens_finds_out_and_listens_again(
    url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.store.database.CHECK_S", ANSWER_S)
    database = Database(url, answer_s=ANSWER_S)
    heard = database.listen("anything")
    first = asyncio.ensure_future(anext(heard))
    lost = await listening(database)
    with frozen(directory):
        await asyncio.sleep(3 * ANSWER_S)
    await listening(database, lost)
    async with database.transaction() as conn:
        await conn.execute(text("NOTIFY anything, 'again'"))
    assert await first == "again"
    await heard.aclose()
    await database.dispose()


async def test_queries_are_admitted_meanwhile(url: str, directory: Path) -> None:
    database = Database(url, answer_s=ANSWER_S)
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "base")
    admission = Admission(database)
    await admission.start()
    with frozen(directory):
        async with asyncio.timeout(1):
            assert (await admission.resolve("errata")).version_id == "v0"
    await admission.stop()
    await database.dispose()
