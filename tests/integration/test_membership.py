"""A replica's part in rollouts, against a real store, with an engine without a model."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from service.errors import NotFound, Unavailable, VersionRejected
from service.replica.bank import VersionBank
from service.replica.echo import EchoEngine
from service.replica.membership import Fenced, Membership
from service.store import replicas, serving
from service.store.database import Database
from service.versions import ReplicaStatus, StagedVersion
from tests.tiny_model import publish, register, stored

pytestmark = pytest.mark.anyio

FINGERPRINT = "f" * 64
LEASE_S = 10.0


class Member:
    """A replica without Serve or a model: `run` is its background task."""

    def __init__(self, database: Database, store: Path) -> None:
        self.engine = EchoEngine()
        self.bank = VersionBank(
            self.engine, stored(str(store), FINGERPRINT), FINGERPRINT, capacity=2
        )
        self.membership = Membership("replica", database, self.bank, heartbeat_s=0.05)
        self.running: asyncio.Task[None] | None = None


@pytest.fixture
async def store(database: Database, tmp_path: Path) -> Path:
    """v1 and v2 are published and registered; v3 is registered only."""
    for version_id in ("v1", "v2"):
        publish(str(tmp_path), version_id, FINGERPRINT)
    await register(database, FINGERPRINT, "v1", "v2", "v3")
    return tmp_path


@asynccontextmanager
async def joined(database: Database, store: Path) -> AsyncIterator[Member]:
    member = Member(database, store)
    await member.membership.join()
    member.running = asyncio.create_task(member.membership.run())
    try:
        yield member
    finally:
        member.running.cancel()
        await asyncio.gather(member.running, return_exceptions=True)


async def status(database: Database) -> ReplicaStatus | None:
    async with database.transaction() as conn:
        found = await replicas.live(conn, LEASE_S)
    return next(iter(found), None)


async def request(database: Database, version_id: str, percent: float | None = None) -> None:
    async with database.transaction() as conn:
        await serving.request(conn, version_id, percent=percent)


async def roll_out(database: Database, version_id: str, percent: float | None = None) -> None:
    await request(database, version_id, percent)
    await acknowledgement(database, version_id)
    await commit(database, version_id)


async def acknowledgement(database: Database, version_id: str) -> StagedVersion:
    async def there() -> bool:
        one = await status(database)
        return one is not None and version_id in {ack.version_id for ack in one.staged}

    await until(there)
    one = await status(database)
    assert one is not None
    return next(ack for ack in one.staged if ack.version_id == version_id)


async def commit(database: Database, version_id: str) -> None:
    async with database.transaction() as conn:
        present = await serving.current(conn)
        await serving.commit(conn, version_id, present.generation, ["replica"])


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_it_stages_acknowledges_and_keeps_what_is_committed(
    database: Database, store: Path
) -> None:
    async with joined(database, store) as member:
        await request(database, "v1")
        ack = await acknowledgement(database, "v1")
        assert ack.digest == await member.bank.ensure("v1")
        await commit(database, "v1")
        await request(database, "v2")
        await acknowledgement(database, "v2")
        assert set(member.bank.resident) == {"v0", "v1", "v2"}


async def test_what_is_resident_is_acknowledged_without_being_loaded_again(
    database: Database, store: Path
) -> None:
    async with joined(database, store) as member:
        for version_id in ("v1", "v2", "v1", "v0", "v2"):
            await roll_out(database, version_id)
        assert member.engine.stagings == ["v1", "v2"]


async def test_the_canary_and_the_parent_of_what_is_live_are_kept(
    database: Database, store: Path
) -> None:
    publish(str(store), "v3", FINGERPRINT)
    publish(str(store), "v4", FINGERPRINT)
    async with joined(database, store) as member:
        await roll_out(database, "v1")
        await roll_out(database, "v2", percent=5.0)
        for other in ("v3", "v4"):
            with suppress(Unavailable):
                await member.bank.ensure(other)
        assert {"v1", "v2"} <= set(member.bank.resident)
    late = Member(database, store)
    await late.membership.join()
    assert set(late.bank.resident) == {"v0", "v1", "v2"}


async def test_a_rotten_canary_keeps_no_replica_from_joining(
    database: Database, store: Path
) -> None:
    async with joined(database, store):
        await roll_out(database, "v2", percent=5.0)
    next((store / "versions" / "v2").glob("*.safetensors")).write_bytes(b"rotten")
    async with joined(database, store) as member:
        assert member.bank.resident == ("v0",)


async def test_it_is_not_counted_before_it_holds_what_is_committed(
    database: Database, store: Path
) -> None:
    async with joined(database, store):
        await request(database, "v1")
        await acknowledgement(database, "v1")
        await commit(database, "v1")
    late = Member(database, store)
    await late.membership.join()
    assert "v1" in late.bank.resident


async def test_it_does_not_start_without_what_is_committed(database: Database, store: Path) -> None:
    async with joined(database, store):
        await request(database, "v1")
        await acknowledgement(database, "v1")
        await commit(database, "v1")
    next((store / "versions" / "v1").glob("*.safetensors")).write_bytes(b"rotten")
    with pytest.raises(VersionRejected, match="v1"):
        await Member(database, store).membership.join()


async def test_one_that_joins_during_a_bad_rollout_reports_it(
    database: Database, store: Path
) -> None:
    next((store / "versions" / "v1").glob("*.safetensors")).write_bytes(b"rotten")
    await request(database, "v1")
    async with joined(database, store):
        assert "expected sha256" in (await acknowledgement(database, "v1")).error


async def test_a_bad_version_is_reported_and_can_be_tried_again(
    database: Database, store: Path
) -> None:
    async with joined(database, store) as member:
        await request(database, "v3")
        ack = await acknowledgement(database, "v3")
        assert ack.digest is None
        assert "manifest" in (ack.error or "")
        async with database.transaction() as conn:
            await serving.abandon(conn, "v3", error=ack.error, rejected=False)
        with pytest.raises(NotFound):
            await member.bank.ensure("v3")
        publish(str(store), "v3", FINGERPRINT)
        await request(database, "v3")

        async def mended() -> bool:
            return (await acknowledgement(database, "v3")).digest is not None

        await until(mended)


async def test_a_fenced_replica_ends(database: Database, store: Path) -> None:
    async with joined(database, store) as member:
        async with database.transaction() as conn:
            await replicas.fence(conn, "replica")
        assert member.running is not None
        with pytest.raises(ExceptionGroup) as ended:
            await asyncio.wait_for(member.running, 10)
        assert [type(error) for error in ended.value.exceptions] == [Fenced]


async def test_a_forgotten_replica_joins_again_and_acknowledges_again(
    database: Database, store: Path
) -> None:
    async with joined(database, store):
        await request(database, "v1")
        await acknowledgement(database, "v1")
        async with database.transaction() as conn:
            await replicas.leave(conn, "replica")
        assert (await acknowledgement(database, "v1")).digest


async def test_it_outlives_the_databases_absence(
    database: Database, database_url: str, store: Path
) -> None:
    name = make_url(database_url).database
    server = database_url.replace(f"/{name}?", "/postgres?", 1)
    async with joined(database, store) as member:
        with psycopg.connect(server, autocommit=True) as conn:
            conn.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")  # type: ignore[arg-type]
            conn.execute(
                "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = %s",
                (name,),
            )
            await asyncio.sleep(0.5)
            assert member.running is not None
            assert not member.running.done()
            assert await member.bank.ensure("v2")
            conn.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")  # type: ignore[arg-type]

        async def back() -> bool:
            one = await status(database)
            return one is not None and "v2" in one.resident

        await until(back)


async def test_leaving_takes_the_row_away(database: Database, store: Path) -> None:
    async with joined(database, store) as member:
        pass
    await member.membership.leave()
    assert await status(database) is None
