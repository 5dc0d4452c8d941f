"""The Replica deployment on real Ray Serve with a real store: rollouts, routing, scaling."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.handle import DeploymentHandle

from service.api.app import create_api
from service.build import source_digest
from service.errors import InvalidInput, NotFound, Unavailable, VersionRejected, VersionUnavailable
from service.inference import CompletionRequest
from service.metrics import exporters
from service.replica import deployment
from service.replica.client import ServeInference
from service.replica.deployment import ROUTING_S, Load, load_engine
from service.replica.running import running_replicas
from service.settings import Settings
from service.store import replicas, serving
from service.store.database import Database
from service.versions import ReplicaStatus
from tests import paced_replicas
from tests.paced_replicas import Asker
from tests.tiny_model import publish, register, save_tiny_model
from workers.models import fingerprint

pytestmark = pytest.mark.anyio

LEASE_S = 10.0
APP = "replicas"
BASE = "base"
QUERIES = 20
ROUTER_S = 4 * ROUTING_S
"""Until what replicas hold, and whether there are any, has come to the router, which tells nobody.
"""
VERSION_BYTES = 64 * 128 * 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        logging_level="warning",
        _system_config={"metrics_report_interval_ms": 500},
    )
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        model=str(tmp_path / "model"),
        data_dir=tmp_path,
        version_store=str(tmp_path / "store"),
        heartbeat_s=0.2,
        kv_tokens=512,
        fetch_attempts=1,
    )


@asynccontextmanager
async def running(
    settings: Settings, database: Database, database_url: str, base: str, load: Load
) -> AsyncIterator[DeploymentHandle]:
    """Replicas that are ready; they sign off at the end."""
    asker = serve.deployment(Asker).options(ray_actor_options={"num_cpus": 0})
    app = asker.bind(deployment.replicas(settings, database_url, base, source_digest(), load))
    try:
        await asyncio.to_thread(serve.run, app, name=APP, route_prefix=None)
        yield serve.get_deployment_handle("Replica", APP)
    finally:
        await asyncio.to_thread(serve.delete, APP)
    assert await live(database) == []


@pytest.fixture
async def handle(
    cluster: None, settings: Settings, database: Database, database_url: str
) -> AsyncIterator[DeploymentHandle]:
    """Two ready replicas; v0 is live, v1 to v3 are published, v2 with a flipped bit."""
    base = fingerprint(save_tiny_model(Path(settings.model)))
    for version_id in ("v1", "v2", "v3"):
        publish(settings.version_store_url, version_id, base)
    await register(database, base, "v1", "v2", "v3")
    flip_a_bit(Path(settings.version_store_url) / "versions" / "v2")
    async with running(settings, database, database_url, base, load_engine) as handle:
        yield handle


def flip_a_bit(version: Path) -> None:
    shard = next(version.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


async def live(database: Database) -> list[ReplicaStatus]:
    async with database.transaction() as conn:
        return await replicas.live(conn, LEASE_S)


async def known(database: Database) -> list[ReplicaStatus]:
    """All replicas that have not signed off, the dead ones too."""
    async with database.transaction() as conn:
        return await replicas.seen(conn, 3600)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(120):
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
    await replica_fenced(inference, database)


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


async def replica_fenced(inference: ServeInference, database: Database) -> None:
    """A fenced one is started again under another name; it refuses until then, to no one's harm."""
    present = await live(database)
    async with database.transaction() as conn:
        await replicas.fence(conn, present[0].id)
    ids = {one.id for one in present}

    async def replaced() -> bool:
        await asyncio.gather(answer(inference, "v0"), answer(inference, "v1"), asyncio.sleep(0.5))
        return any(one.id not in ids for one in await live(database))

    await until(replaced)


async def prepare(settings: Settings, database: Database, *version_ids: str) -> None:
    """Versions of a base that only `paced_replicas` can be."""
    for version_id in version_ids:
        publish(settings.version_store_url, version_id, BASE)
    await register(database, BASE, *version_ids)


async def ask(inference: ServeInference, version_id: str) -> None:
    completion = await inference.complete(CompletionRequest(version_id, "one two three"))
    assert completion.text == f" {version_id} one two three"


async def holding(database: Database, version_id: str) -> set[str]:
    return {one.id for one in await live(database) if version_id in one.resident}


async def test_routing(
    cluster: None, settings: Settings, database: Database, database_url: str
) -> None:
    """Queries go where their version is, and around a replica that cannot answer."""
    await prepare(settings, database, "v11", "v12", "v13")
    manifest = Path(settings.version_store_url) / "versions" / "v13" / "manifest.json"
    manifest.unlink()
    manifest.mkdir()
    async with running(settings, database, database_url, BASE, paced_replicas.load) as handle:
        inference = ServeInference(handle)
        assert await running_replicas(handle) == {one.id for one in await live(database)}

        async def held() -> bool:
            return len(await holding(database, "v11")) == 1

        await ask(inference, "v11")
        await until(held)
        await asyncio.sleep(ROUTER_S)
        await asyncio.gather(*(ask(inference, "v11") for _ in range(QUERIES)))
        assert await held()

        # One call's queries are told apart, though Serve gives them the same id.
        asker = serve.get_deployment_handle("Asker", APP)
        requests = [CompletionRequest("v12", f"choice {number}") for number in range(QUERIES)]
        texts = await asker.ask.remote(requests)
        assert texts == [f" v12 choice {number}" for number in range(QUERIES)]

        # Nobody can read its manifest: each is asked once, and says so.
        with pytest.raises(VersionUnavailable, match="No replica can answer with v13 now"):
            await inference.complete(CompletionRequest("v13", "one"))
        with pytest.raises(VersionUnavailable, match="v13"):
            await anext(inference.stream(CompletionRequest("v13", "one")))
        await exported(settings, database, inference)


async def exported(settings: Settings, database: Database, inference: ServeInference) -> None:
    """A scrape through the api shows what `test_routing` has done."""
    app = create_api(settings, database, inference, exporters)
    transport = httpx.ASGITransport(app)
    page, held = "", 0
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:

        async def told() -> bool:
            nonlocal page, held
            held = sum(len(one.resident) for one in await live(database))
            answer = await client.get("/metrics")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            page = answer.text
            # Gauges of replicas that have ended are shown for a while.
            return (
                total(page, "queries_total", version="v13") == 2
                and total(page, "resident_versions") == held
                and total(page, "resident_bytes") == (held - 2) * VERSION_BYTES
            )

        await until(told)
    asked = QUERIES + 1
    assert total(page, "queries_total", version="v11", outcome="answered") == asked
    assert total(page, "queries_total", version="v13", outcome="unavailable") == 2
    # The counter is this process's: a replica that was fenced before may have refused, too.
    assert total(page, "query_retries_total", reason="refused") >= 4
    assert total(page, "prompt_tokens_total", version="v11") == 3 * asked
    assert total(page, "completion_tokens_total", version="v11") == 4 * asked
    assert total(page, "time_to_first_token_seconds_count") >= asked
    assert total(page, "inter_token_seconds_count") >= 4 * asked
    assert total(page, "completion_tokens_total", version="v12") == 3 * QUERIES
    assert total(page, "staged_bytes_total") >= (held - 2) * VERSION_BYTES
    assert total(page, "stage_seconds_count") >= held - 2


def total(page: str, name: str, **tags: str) -> float:
    """Over all processes and the tags that are not named."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == f"ray_errata_{name}" and tags.items() <= sample.labels.items()
    )


async def test_scale_to_zero_and_back(
    cluster: None, settings: Settings, database: Database, database_url: str
) -> None:
    """An idle service has no replica; a query wakes one, which holds what is committed."""
    await prepare(settings, database, "v21")
    await commit(database, "v21")
    settings = settings.replace(replicas=1, replicas_min=0, replicas_max=1, scale_down_after_s=1)
    async with running(settings, database, database_url, BASE, paced_replicas.load) as handle:
        inference = ServeInference(handle)

        async def gone() -> bool:
            return await known(database) == [] and await running_replicas(handle) == set()

        await until(gone)
        await asyncio.sleep(ROUTER_S)
        with pytest.raises(Unavailable, match=r"within 0\.2 s.*try again soon"):
            await ask(ServeInference(handle, answer_s=0.2), "v21")
        await ask(inference, "v21")
        (woken,) = await live(database)
        assert "v21" in woken.resident
        assert await running_replicas(handle) == {woken.id}
        await given_up(handle, woken.id)

        # Ended while it answers: it answers to the end, then signs off.
        request = CompletionRequest("v21", " ".join(["word"] * 100), 101)
        chunks = inference.stream(request)
        text = (await anext(chunks)).text
        deleted = asyncio.create_task(asyncio.to_thread(serve.delete, APP))
        async for chunk in chunks:
            text += chunk.text
        assert text == " v21" + " word" * 100
        await deleted
        assert await known(database) == []


async def given_up(handle: DeploymentHandle, replica_id: str) -> None:
    """What nobody waits for any more is not answered to its end, which is minutes away."""
    replica = ray.get_actor(f"SERVE_REPLICA::{APP}#Replica#{replica_id}", "serve")
    request = CompletionRequest("v21", " ".join(["word"] * 20_000), 20_001)

    async def idle() -> bool:
        return await replica.get_num_ongoing_requests.remote() == 0

    chunks = ServeInference(handle).stream(request)
    await anext(chunks)
    assert not await idle()
    await chunks.aclose()
    await until(idle)

    with pytest.raises(Unavailable, match="within 1 s"):
        await ServeInference(handle, answer_s=1).complete(request)
    await until(idle)


async def commit(database: Database, version_id: str) -> None:
    """With a replica that comes and goes for it."""
    async with database.transaction() as conn:
        await replicas.join(conn, "passing", ())
        present = await serving.request(conn, version_id)
        await replicas.acknowledge(conn, "passing", version_id, "digest")
        await serving.commit(conn, version_id, present.generation, ["passing"])
        await replicas.leave(conn, "passing")
