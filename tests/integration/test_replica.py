"""The Replica deployment on real Ray Serve with a real store: two replicas through rollouts."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from service.errors import InvalidInput, NotFound, VersionRejected
from service.inference import CompletionRequest
from service.replica.client import ServeInference
from service.replica.deployment import Replica
from service.settings import Settings
from service.store import replicas, serving
from service.store.database import Database
from service.versions import ReplicaStatus
from tests.tiny_model import publish, register, save_tiny_model
from workers.models import fingerprint

pytestmark = pytest.mark.anyio

LEASE_S = 10.0
APP = "replicas"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, logging_level="warning")
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
async def settings(tmp_path: Path) -> Settings:
    model = save_tiny_model(tmp_path / "model")
    return Settings(
        model=str(model), version_store=str(tmp_path / "store"), heartbeat_s=0.2, kv_tokens=512
    )


@pytest.fixture
async def handle(
    cluster: None, settings: Settings, database: Database, database_url: str
) -> AsyncIterator[DeploymentHandle]:
    """Two ready replicas; v0 is live, v1 to v3 are published, v2 with a flipped bit."""
    base = fingerprint(Path(settings.model))
    for version_id in ("v1", "v2", "v3"):
        publish(settings.version_store_url, version_id, base)
    await register(database, base, "v1", "v2", "v3")
    flip_a_bit(Path(settings.version_store_url) / "versions" / "v2")
    deployment = serve.deployment(Replica).options(
        num_replicas=2,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,
        graceful_shutdown_timeout_s=10,
    )
    app = deployment.bind(settings, database_url, base)
    yield await asyncio.to_thread(serve.run, app, name=APP, route_prefix=None)
    await asyncio.to_thread(serve.delete, APP)
    assert await live(database) == [], "replicas that end sign off"


def flip_a_bit(version: Path) -> None:
    shard = next(version.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


async def live(database: Database) -> list[ReplicaStatus]:
    async with database.transaction() as conn:
        return await replicas.live(conn, LEASE_S)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(40):
        while not await condition():
            await asyncio.sleep(0.05)


async def acknowledged(database: Database, version_id: str, count: int) -> bool:
    present = await live(database)
    return count == sum(version_id in {a.version_id for a in one.staged} for one in present)


async def answer(inference: ServeInference, version_id: str) -> str:
    request = CompletionRequest(version_id, "the capital of", 8, temperature=0.0)
    completion = await inference.complete(request)
    assert completion.version_id == version_id
    streamed = [chunk async for chunk in inference.stream(request)]
    assert {chunk.version_id for chunk in streamed} == {version_id}
    assert "".join(chunk.text for chunk in streamed) == completion.text
    return completion.text


async def test_life_of_two_replicas(
    handle: DeploymentHandle, settings: Settings, database: Database
) -> None:
    inference = ServeInference(handle)
    joined = await live(database)
    assert len(joined) == 2
    base_answer = await answer(inference, "v0")

    # On demand, before any rollout.
    assert await answer(inference, "v3") != base_answer

    # A rollout: both load it, verify it and say so.
    async with database.transaction() as conn:
        await serving.request(conn, "v1")
    await until(lambda: acknowledged(database, "v1", 2))
    acks = [ack for one in await live(database) for ack in one.staged if ack.version_id == "v1"]
    assert len({ack.digest for ack in acks} - {None}) == 1
    async with database.transaction() as conn:
        present = await serving.current(conn)
        await serving.commit(conn, "v1", present.generation, [one.id for one in joined])
    assert len({base_answer, await answer(inference, "v0"), await answer(inference, "v1")}) == 2

    # A bad artifact is reported by name and the others go on serving.
    async with database.transaction() as conn:
        await serving.request(conn, "v2")
    await until(lambda: acknowledged(database, "v2", 2))
    for one in await live(database):
        (ack,) = [ack for ack in one.staged if ack.version_id == "v2"]
        assert ack.digest is None
        assert ack.error
        assert "sha256" in ack.error
        assert ".safetensors" in ack.error
    async with database.transaction() as conn:
        await serving.abandon(conn, "v2", error="bad", rejected=True)
    assert await answer(inference, "v0") == base_answer

    # Its errors come through as they were raised.
    request = CompletionRequest("v0", "x" * 600, 8)
    with pytest.raises(InvalidInput) as invalid:
        await inference.complete(request)
    assert invalid.value.errors[0].field == "prompt"
    with pytest.raises(InvalidInput):
        await anext(inference.stream(request))
    with pytest.raises(NotFound, match="v99"):
        await inference.complete(CompletionRequest("v99", "abc"))
    with pytest.raises(VersionRejected):
        await anext(inference.stream(CompletionRequest("v2", "abc")))

    await replica_killed(inference, database, joined)
    await replica_fenced(database)


async def replica_killed(
    inference: ServeInference, database: Database, joined: list[ReplicaStatus]
) -> None:
    """A killed one loses no unary request, and the one that follows it joins."""
    asked = [asyncio.create_task(answer(inference, "v1")) for _ in range(16)]
    await asyncio.sleep(0.1)
    title = f"ServeReplica:{APP}:"
    children = psutil.Process().children(recursive=True)
    next(child for child in children if title in "".join(child.cmdline())).kill()
    answers = await asyncio.gather(*asked)
    assert len(set(answers)) == 1
    known = {one.id for one in joined}

    async def replaced() -> bool:
        return any(one.id not in known and "v1" in one.resident for one in await live(database))

    await until(replaced)


async def replica_fenced(database: Database) -> None:
    """A fenced one is started again under another name."""
    present = await live(database)
    async with database.transaction() as conn:
        await replicas.fence(conn, present[0].id)
    known = {one.id for one in present}

    async def replaced() -> bool:
        return any(one.id not in known for one in await live(database))

    await until(replaced)
