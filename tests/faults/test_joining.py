"""A replica that joins in the middle of a rollout, wherever the rollout just is.

Real store, coordinator and versions; without Ray, and with an engine without a model.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url
from torch import Tensor

from service.jobs import JobState
from service.replica.bank import VersionBank
from service.replica.echo import EchoEngine
from service.replica.fetching import Fetcher
from service.replica.membership import Membership
from service.store import edits, replicas, serving, versions
from service.store.database import Database
from service.versions import ReplicaStatus, Serving
from tests.coordinating import EDITS, coordinating, ended, served, start_job, until
from tests.faults.leader import settings
from tests.proxy import TcpProxy
from tests.tiny_model import publish, stored
from workers.artifact import Manifest

pytestmark = pytest.mark.anyio


class HeldSource:
    """Gives nothing out before it is released."""

    def __init__(self, source: Fetcher) -> None:
        self._source = source
        self.released = threading.Event()

    def manifest(self, version_id: str) -> Manifest:
        return self._source.manifest(version_id)

    def tensors(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        assert self.released.wait(30)
        return self._source.tensors(manifest)


class Member:
    """A replica without Serve or a model; it reads no version before it is `released`."""

    def __init__(self, replica_id: str, database: Database, folder: Path) -> None:
        self._source = HeldSource(stored(str(folder), "base"))
        self.bank = VersionBank(EchoEngine(), self._source, "base", capacity=2)
        self._membership = Membership(replica_id, database, self.bank, heartbeat_s=0.1)
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self._membership.join()
        await self._membership.run()

    def release(self) -> None:
        self._source.released.set()

    async def end(self) -> None:
        self.release()
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)


@pytest.fixture
async def store(database: Database, database_url: str, tmp_path: Path) -> Database:
    """v0 is live; v1 is published."""
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "base")
        await edits.add(conn, EDITS)
    async with coordinating(database, database_url, settings(tmp_path)):
        job = await start_job(database, activate=False)
        assert (await ended(database, job.id)).state is JobState.DONE
    publish(str(tmp_path), "v1", "base")
    return database


@asynccontextmanager
async def members(store: Database, folder: Path, *names: str) -> AsyncIterator[list[Member]]:
    made = [Member(name, store, folder) for name in names]
    try:
        yield made
    finally:
        for member in made:
            await member.end()


async def present(store: Database) -> dict[str, ReplicaStatus]:
    async with store.transaction() as conn:
        return {one.id: one for one in await replicas.live(conn, 60.0)}


async def joined(store: Database, *names: str) -> None:
    async def look() -> bool | None:
        return (await present(store)).keys() == {*names} or None

    await until(look)


async def committed(store: Database) -> Serving:
    async def look() -> Serving | None:
        now = await served(store)
        return now if now.generation == 2 else None

    return await until(look)


async def request(store: Database) -> None:
    async with store.transaction() as conn:
        await serving.request(conn, "v1")


async def test_one_that_is_not_ready_is_not_waited_for(
    store: Database, database_url: str, tmp_path: Path
) -> None:
    async with (
        coordinating(store, database_url, settings(tmp_path)),
        members(store, tmp_path, "a") as [first],
    ):
        await joined(store, "a")
        await request(store)
        async with members(store, tmp_path, "b") as [late]:
            first.release()
            assert (await committed(store)).version_id == "v1"
            assert (await present(store)).keys() == {"a"}
            late.release()
            await joined(store, "a", "b")
            assert "v1" in late.bank.resident


async def test_one_that_has_joined_is_waited_for(
    store: Database, database_url: str, tmp_path: Path
) -> None:
    async with (
        coordinating(store, database_url, settings(tmp_path)),
        members(store, tmp_path, "a") as [first],
    ):
        await joined(store, "a")
        await request(store)
        async with members(store, tmp_path, "b") as [late]:
            late.release()
            await joined(store, "a", "b")

            async def acknowledged() -> bool | None:
                return bool((await present(store))["b"].staged) or None

            await until(acknowledged)
            assert (await served(store)).generation == 1
            first.release()
            await committed(store)
            assert all("v1" in one.resident for one in (first.bank, late.bank))
            assert (await present(store)).keys() == {"a", "b"}


async def test_one_that_starts_while_the_database_is_away(
    store: Database, database_url: str, tmp_path: Path
) -> None:
    url = make_url(database_url)
    with TcpProxy(Path(str(url.query["host"])) / ".s.PGSQL.5432") as proxy:
        host, port = proxy.address
        through = Database(str(url.set(host=host, port=port, query={})), answer_s=0.5)
        proxy.refuse()
        async with members(through, tmp_path, "a") as [member]:
            member.release()
            await asyncio.sleep(0.5)
            proxy.release()
            await joined(store, "a")
        await through.dispose()
