"""The serving row: one live version, a generation that only grows, replicas that hold it."""

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.edits import NewEdit
from service.errors import Conflict, NotFound, Unavailable
from service.store import edits, jobs, replicas, serving, versions
from service.store.database import Database
from service.store.leadership import Leadership
from service.versions import Committed, ReplicaState, Serving, Version, VersionState
from tests.backends import END_LOCK_HOLDERS, listening

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(database: Database) -> Database:
    """With v0 live, v1 and v2 published, and replica `a` joined."""
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "base")
        for number in (1, 2):
            await edits.add(conn, [NewEdit(f"fact {number}", "target")])
            job = await jobs.create(conn)
            await versions.publish(
                conn,
                version_id=f"v{number}",
                parent_id="v0",
                job_id=job.id,
                base_fingerprint="base",
                metrics={},
            )
    assert await join(database, "a")
    return database


async def join(store: Database, replica_id: str, *resident: str) -> bool:
    async with store.transaction() as conn:
        return await replicas.join(conn, replica_id, resident)


async def request(store: Database, version_id: str) -> Serving:
    async with store.transaction() as conn:
        return await serving.request(conn, version_id)


async def stage(store: Database, replica_id: str, version_id: str, digest: str = "d") -> None:
    async with store.transaction() as conn:
        await replicas.acknowledge(conn, replica_id, version_id, digest, None)


async def commit(store: Database, version_id: str, generation: int, *ids: str) -> Serving:
    async with store.transaction() as conn:
        return await serving.commit(conn, version_id, generation, ids)


async def activate(store: Database, version_id: str, *ids: str) -> Serving:
    now = await request(store, version_id)
    for replica_id in ids:
        await stage(store, replica_id, version_id)
    return await commit(store, version_id, now.generation, *ids)


async def version(store: Database, version_id: str) -> Version:
    async with store.transaction() as conn:
        return await versions.get(conn, version_id)


async def test_forward_and_back(store: Database) -> None:
    for generation, wanted in enumerate(["v1", "v2", "v1", "v0", "v2"], start=2):
        committed = await activate(store, wanted, "a")
        assert committed.generation == generation
        assert (committed.version_id, committed.staging_id) == (wanted, None)
    assert [(await version(store, f"v{n}")).state for n in range(3)] == [
        VersionState.RETIRED,
        VersionState.RETIRED,
        VersionState.LIVE,
    ]


async def test_nothing_is_served_before_the_base_is_registered(database: Database) -> None:
    async with database.transaction() as conn:
        with pytest.raises(Unavailable, match="base model"):
            await serving.current(conn)
        assert not await replicas.join(conn, "a", [])


async def test_only_one_rollout_at_a_time(store: Database) -> None:
    now = await request(store, "v1")
    assert now.staging_id == "v1"
    assert await request(store, "v1") == now
    with pytest.raises(Conflict, match="v1 is being rolled out"):
        await request(store, "v2")
    with pytest.raises(Conflict, match="v2 is not being rolled out"):
        await commit(store, "v2", now.generation)
    with pytest.raises(NotFound, match="v99"):
        await request(store, "v99")


async def test_what_is_live_need_not_be_rolled_out(store: Database) -> None:
    assert (await request(store, "v0")).staging_id is None


async def test_two_commits_at_once_one_wins(store: Database) -> None:
    now = await request(store, "v1")
    await stage(store, "a", "v1")
    outcomes = await asyncio.gather(
        *(commit(store, "v1", now.generation, "a") for _ in range(4)), return_exceptions=True
    )
    won = [outcome for outcome in outcomes if isinstance(outcome, Serving)]
    assert [one.generation for one in won] == [now.generation + 1]
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 3


async def test_a_commit_needs_every_named_replica(store: Database) -> None:
    assert await join(store, "b")
    now = await request(store, "v1")
    with pytest.raises(Conflict, match="not staged on any"):
        await commit(store, "v1", now.generation)
    await stage(store, "a", "v1")
    with pytest.raises(Conflict, match="not staged on b"):
        await commit(store, "v1", now.generation, "a", "b")
    async with store.transaction() as conn:
        await replicas.acknowledge(conn, "b", "v1", None, "a shard is missing")
    with pytest.raises(Conflict, match="not staged on b"):
        await commit(store, "v1", now.generation, "a", "b")
    await stage(store, "b", "v1", "another digest")
    with pytest.raises(Conflict, match="different digests"):
        await commit(store, "v1", now.generation, "a", "b")
    async with store.transaction() as conn:
        await replicas.fence(conn, "b")
    with pytest.raises(Conflict, match="not staged on b"):
        await commit(store, "v1", now.generation, "a", "b")
    await commit(store, "v1", now.generation, "a")


async def test_a_replica_that_was_away_cannot_serve_before_it_joins_again(store: Database) -> None:
    assert await join(store, "away")
    now = await request(store, "v1")
    await stage(store, "a", "v1")
    await commit(store, "v1", now.generation, "a")
    async with store.transaction() as conn:
        assert await replicas.heartbeat(conn, "away", []) is ReplicaState.FENCED
        assert await replicas.heartbeat(conn, "never joined", []) is None
        assert [one.id for one in await replicas.live(conn, 60)] == ["a"]
    assert not await join(store, "away")
    assert await join(store, "away", "v1")


async def test_each_rollout_asks_for_new_acknowledgements(store: Database) -> None:
    await activate(store, "v1", "a")
    await activate(store, "v2", "a")
    now = await request(store, "v1")
    with pytest.raises(Conflict, match="not staged"):
        await commit(store, "v1", now.generation, "a")


async def test_joining_and_committing_at_once(store: Database) -> None:
    """Whoever is first, no ready replica lacks what is committed."""
    for turn, wanted in enumerate(["v1", "v2"] * 5):
        now = await request(store, wanted)
        await stage(store, "a", wanted)
        joiner = f"joiner {turn}"
        _, joined = await asyncio.gather(
            commit(store, wanted, now.generation, "a"), join(store, joiner, now.version_id)
        )
        assert not joined
        assert await join(store, joiner, wanted)
        async with store.transaction() as conn:
            await replicas.leave(conn, joiner)


async def test_a_rollout_given_up_leaves_all_as_it_was(store: Database) -> None:
    await activate(store, "v1", "a")
    await activate(store, "v0", "a")
    for version_id, after in (("v1", VersionState.RETIRED), ("v2", VersionState.PUBLISHED)):
        await request(store, version_id)
        async with store.transaction() as conn:
            now = await serving.abandon(conn, version_id, error="too slow", rejected=False)
        assert (now.version_id, now.staging_id) == ("v0", None)
        given_up = await version(store, version_id)
        assert (given_up.state, given_up.error) == (after, "too slow")
    await request(store, "v2")
    assert (await version(store, "v2")).error is None


async def test_a_rejected_version_stays_so(store: Database) -> None:
    await request(store, "v1")
    async with store.transaction() as conn:
        await serving.abandon(conn, "v1", error="digest differs", rejected=True)
        with pytest.raises(Conflict, match="not being rolled out"):
            await serving.abandon(conn, "v1", error=None, rejected=True)
        with pytest.raises(Conflict, match="never followed"):
            await versions.move(conn, "v1", VersionState.PUBLISHED)
    with pytest.raises(Conflict, match="digest differs"):
        await request(store, "v1")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE serving SET generation = 0",
        "UPDATE serving SET version_id = 'v1'",
        "DELETE FROM serving",
        "UPDATE versions SET state = 'live'",
        "INSERT INTO serving (id, generation, version_id) VALUES (2, 1, 'v0')",
    ],
)
async def test_the_database_itself_refuses(store: Database, statement: str) -> None:
    with pytest.raises(DBAPIError):
        async with store.transaction() as conn:
            await conn.execute(text(statement))


async def test_every_change_is_announced(store: Database) -> None:
    heard = store.listen(serving.CHANNEL)
    first = asyncio.ensure_future(anext(heard))
    await listening(store)
    await activate(store, "v1", "a")
    staging, committed = [serving.announced(each) for each in (await first, await anext(heard))]
    assert (staging.committed, staging.staging_id) == (Committed(1, "v0"), "v1")
    assert (committed.committed, committed.staging_id) == (Committed(2, "v1"), None)
    async with store.transaction() as conn:
        assert await serving.current(conn) == committed
    await heard.aclose()


async def test_listening_goes_on_after_the_connection_is_lost(store: Database) -> None:
    heard = store.listen("anything")
    first = asyncio.ensure_future(anext(heard))
    lost = await listening(store)
    async with store.transaction() as conn:
        await conn.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": lost})
    await listening(store, lost)
    async with store.transaction() as conn:
        await conn.execute(text("NOTIFY anything, 'again'"))
    assert await first == "again"
    await heard.aclose()


async def test_replicas_are_forgotten(store: Database) -> None:
    async with store.transaction() as conn:
        await conn.execute(text("UPDATE replicas SET heartbeat_at = now() - interval '1 hour'"))
        assert await replicas.seen(conn, 60) == []
        assert await replicas.prune(conn, 60) == 1
        with pytest.raises(Conflict, match="a has not joined"):
            await replicas.acknowledge(conn, "a", "v1", "d", None)


async def test_one_leads_and_the_next_follows(database_url: str) -> None:
    first, second = Leadership(database_url), Leadership(database_url)
    assert await first.try_acquire()
    assert not await second.try_acquire()
    assert not await second.held()
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(0)
    await first.release()
    async with asyncio.timeout(60):
        await waiting
    assert await second.held()
    assert not await first.held()
    await second.release()


async def test_a_leader_that_lost_its_connection_knows(
    database: Database, database_url: str
) -> None:
    leader = Leadership(database_url)
    await leader.acquire()
    async with database.transaction() as conn:
        await conn.execute(END_LOCK_HOLDERS)
    assert not await leader.held()
    await leader.acquire()
    assert await leader.held()
    await leader.release()
