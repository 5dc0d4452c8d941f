"""Which version answers: canaries and their shares, generations asked for, a commit learnt."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy import make_url

from service.api import admission as admission_module
from service.api.admission import Admission, Admitted
from service.api.app import create_api
from service.errors import NotFound, Unavailable
from service.inference import Chunk, Completion, CompletionRequest
from service.settings import Settings
from service.store import replicas, serving
from service.store.database import Database
from tests.proxy import TcpProxy
from tests.tiny_model import register

pytestmark = pytest.mark.anyio


class Names:
    """Answers with the version that was asked."""

    async def complete(self, request: CompletionRequest) -> Completion:
        return Completion(request.version_id, request.version_id, "stop", 1, 1)

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        yield Chunk(request.version_id, request.version_id, "stop", 1, 1)


@pytest.fixture
async def store(database: Database) -> Database:
    """v0 is live, v1 and v2 are published; replica `a` has joined."""
    await register(database, "base", "v1", "v2")
    async with database.transaction() as conn:
        assert await replicas.join(conn, "a", [])
    return database


@pytest.fixture
async def api(store: Database, database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    app = create_api(Settings(_env_file=None), Database(database_url), Names())  # type: ignore[call-arg]
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://errata") as client,
    ):
        yield client


@asynccontextmanager
async def admitting(store: Database) -> AsyncIterator[Admission]:
    admission = Admission(store)
    await admission.start()
    try:
        yield admission
    finally:
        await admission.stop()


async def roll_out(store: Database, version_id: str, percent: float | None = None) -> int:
    """As every replica and the coordinator do; returns the generation."""
    async with store.transaction() as conn:
        now = await serving.request(conn, version_id, percent=percent)
        await replicas.acknowledge(conn, "a", version_id, "digest")
        return (await serving.commit(conn, version_id, now.generation, ["a"])).generation


async def ask(api: httpx.AsyncClient, user: str | None = None, **headers: str) -> httpx.Response:
    named = {f"X-Errata-{name.replace('_', '-')}": value for name, value in headers.items()}
    body = {"prompt": "x", "user": user}
    return await api.post("/v1/completions", json=body, headers=named)


async def answered_by(api: httpx.AsyncClient, user: str | None = None, **headers: str) -> str:
    response = await ask(api, user, **headers)
    assert response.status_code == 200, response.text
    version: str = response.headers["X-Errata-Version"]
    assert response.json()["choices"][0]["text"] == version
    return version


async def test_names(store: Database) -> None:
    admission = Admission(store)
    unknown = Admission(Database("postgresql://me@127.0.0.1:1/db"))
    with pytest.raises(Unavailable):
        await unknown.resolve("errata")
    await admission.start()
    assert await admission.resolve("errata") == Admitted("v0", 1)
    assert await admission.resolve("errata@base") == Admitted("v0", 1)
    assert await admission.resolve("errata@v1") == Admitted("v1", 1)
    for model in ("gpt", "errata@", "errata@v9", "errata@v01", "errata@\0", "errata@v1 ", ""):
        with pytest.raises(NotFound):
            await admission.resolve(model)
    await admission.stop()


async def test_a_commit_missed_while_cut_off_is_learnt_before_the_next_answer(
    store: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "LOST_S", 0.0)
    monkeypatch.setattr(admission_module, "POLL_S", 60.0)
    url = make_url(database_url)
    socket = Path(str(url.query["host"])) / ".s.PGSQL.5432"
    with TcpProxy(socket) as proxy:
        host, port = proxy.address
        cut_off = Database(f"postgresql://postgres@{host}:{port}/{url.database}")
        async with admitting(cut_off) as admission:
            proxy.hold()
            assert await roll_out(store, "v1") == 2
            monkeypatch.setattr(admission_module, "CATCH_UP_S", 0.1)
            assert await admission.resolve("errata") == Admitted("v0", 1)
            monkeypatch.setattr(admission_module, "CATCH_UP_S", 60.0)
            asked = asyncio.create_task(admission.resolve("errata"))
            await asyncio.sleep(0)
            proxy.release()
            assert await asked == Admitted("v1", 2)
        await cut_off.dispose()


async def test_a_rejected_version_is_no_model(store: Database, api: httpx.AsyncClient) -> None:
    async with store.transaction() as conn:
        await serving.request(conn, "v1")
        await serving.abandon(conn, "v1", error="a digest differs", rejected=True)
    async with admitting(store) as admission:
        with pytest.raises(NotFound, match="a digest differs"):
            await admission.resolve("errata@v1")
    refused = await api.post("/versions/v1/activate")
    assert refused.status_code == 409
    assert "a digest differs" in refused.json()["detail"]
    assert (await api.get("/versions/v1")).json()["state"] == "rejected"


async def test_a_commit_is_learnt_from_its_notification(store: Database) -> None:
    async with admitting(store) as admission:
        took = []
        for version_id in ("v1", "v2", "v1", "v2", "v1"):
            generation = await roll_out(store, version_id)
            started = time.monotonic()
            async with asyncio.timeout(60):
                while await admission.resolve("errata") != Admitted(version_id, generation):
                    await asyncio.sleep(0)
            took.append(time.monotonic() - started)
    polled_every_s = 1.0
    assert sorted(took)[2] < polled_every_s / 2


async def test_own_writes_are_read(store: Database, api: httpx.AsyncClient) -> None:
    generation = await roll_out(store, "v1")
    response = await ask(api, Min_Generation=str(generation))
    assert response.headers["X-Errata-Version"] == "v1"
    assert int(response.headers["X-Errata-Generation"]) >= generation

    late = await ask(api, Min_Generation=str(generation + 1))
    assert late.status_code == 503
    assert int(late.headers["Retry-After"]) > 0
    assert "generation 3 was asked for, and 2" in late.json()["detail"]
    for bad in ("-1", "two", "9" * 30):
        refused = await ask(api, Min_Generation=bad)
        assert refused.status_code == 422
        assert "generation" in refused.json()["errors"][0]["field"].lower()


async def test_a_canary_answers_its_share_and_the_same_users(
    store: Database, api: httpx.AsyncClient
) -> None:
    generation = str(await roll_out(store, "v1", percent=20.0))
    users = [f"user {number}" for number in range(300)]
    first = {user: await answered_by(api, user, Min_Generation=generation) for user in users}
    canaried = {user for user, version in first.items() if version == "v1"}
    assert 0.1 < len(canaried) / len(users) < 0.3
    assert {user: await answered_by(api, user) for user in users[:50]} == dict(
        list(first.items())[:50]
    )
    assert {await answered_by(api, Session=user) for user in canaried} == {"v1"}
    nameless = [await answered_by(api) for _ in range(100)]
    assert 5 <= nameless.count("v1") <= 40

    more = str(await roll_out(store, "v1", percent=60.0))
    grown = {user for user in users if await answered_by(api, user, Min_Generation=more) == "v1"}
    assert canaried < grown


async def test_ready_as_long_as_queries_can_be_answered(
    store: Database, api: httpx.AsyncClient, database_url: str
) -> None:
    assert (await api.get("/readyz")).json() == {"status": "ready"}
    name = make_url(database_url).database
    server = database_url.replace(f"/{name}?", "/postgres?", 1)
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")  # type: ignore[arg-type]
        conn.execute(
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = %s",
            (name,),
        )
        assert (await api.get("/readyz")).json() == {"status": "ready", "database": "away"}
        assert await answered_by(api) == "v0"
        assert (await api.get("/serving")).status_code == 503
        conn.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")  # type: ignore[arg-type]


async def test_a_canary_over_http(store: Database, api: httpx.AsyncClient) -> None:
    started = await api.post("/versions/v1/activate", json={"percent": 5, "promote_after_s": 60})
    assert started.status_code == 202
    assert (started.json()["staging"], started.json()["staging_percent"]) == ("v1", 5)
    other = await api.post("/versions/v2/activate", json={})
    assert other.status_code == 409
    assert "v1 is being rolled out" in other.json()["detail"]
    async with store.transaction() as conn:
        await replicas.acknowledge(conn, "a", "v1", "digest")
        await serving.commit(conn, "v1", 1, ["a"])
    canary = (await api.get("/serving")).json()["canary"]
    assert (canary["version"], canary["percent"]) == ("v1", 5)
    assert canary["promote_at"].endswith("Z")
    assert (await api.get("/versions/v1")).json()["state"] == "staged"

    ended = await api.post("/versions/v0/activate")
    assert (ended.json()["canary"], ended.json()["generation"]) == (None, 3)
    assert await answered_by(api, Min_Generation="3") == "v0"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"percent": 0}, "percent"),
        ({"percent": 101}, "percent"),
        ({"percent": "5"}, "percent"),
        ({"share": 5}, "share"),
        ({"percent": 5, "promote_after_s": -1}, "promote_after_s"),
        ({"promote_after_s": 5}, "body"),
    ],
)
async def test_a_bad_share_is_refused(
    store: Database, api: httpx.AsyncClient, body: dict[str, object], field: str
) -> None:
    refused = await api.post("/versions/v1/activate", json=body)
    assert refused.status_code == 422
    assert [error["field"] for error in refused.json()["errors"]] == [field]
