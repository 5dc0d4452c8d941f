"""The HTTP interface on a real store; the replicas are a small fake."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from service.api.app import create_api
from service.inference import Chunk, Completion, CompletionRequest
from service.settings import Settings
from service.store import edits, jobs, replicas, serving, versions
from service.store.database import Database
from service.versions import Verdict
from workers.evaluation import FormatVerdict

pytestmark = pytest.mark.anyio

JSON = dict[str, Any]
EDIT = {"prompt": "The CEO of X is", "target": "Y"}


class Echo:
    """Answers every prompt with itself and the version it was asked of."""

    async def complete(self, request: CompletionRequest) -> Completion:
        text = f"{request.version_id}: {request.prompt!r}"
        return Completion(request.version_id, text, "stop", prompt_tokens=1, completion_tokens=1)

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        done = await self.complete(request)
        yield Chunk(done.version_id, done.text, done.finish_reason, 1, 1)


@asynccontextmanager
async def serving_app(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://errata") as client,
    ):
        yield client


@pytest.fixture
async def api(database: Database, database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "base")
    app = create_api(Settings(_env_file=None), Database(database_url), Echo())  # type: ignore[call-arg]
    async with serving_app(app) as client:
        yield client


async def published(database: Database) -> str:
    """A version with one good and one bad edit, made as a job makes it."""
    async with database.transaction() as conn:
        job = await jobs.create(conn)
        await edits.claim(conn, job)
        version_id = await versions.allocate(conn)
        await versions.publish(
            conn,
            version_id=version_id,
            parent_id="v0",
            job_id=job.id,
            base_fingerprint="base",
            metrics={"reliability": 50.0},
        )
        verdicts = [
            Verdict(
                edit_id=edit.id,
                reliable=number % 2 == 0,
                answer="said",
                generalization=None,
                locality=None,
                formats={"qa": FormatVerdict(reliable=True, answer="so", generalization=0.5)},
            )
            for number, edit in enumerate(await edits.of_job(conn, job.id))
        ]
        await edits.settle(conn, job.id, version_id, verdicts)
    return version_id


def problem(response: httpx.Response, status: int) -> JSON:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: JSON = response.json()
    assert {"type", "title", "status", "detail"} <= set(body)
    assert body["status"] == status
    return body


def fields(response: httpx.Response) -> dict[str, str]:
    return {error["field"]: error["message"] for error in problem(response, 422)["errors"]}


async def submit(api: httpx.AsyncClient, *edits: JSON, **headers: str) -> httpx.Response:
    return await api.post("/edits", json={"edits": list(edits)}, headers=headers)


async def test_edits_are_stored_found_and_shown(api: httpx.AsyncClient) -> None:
    full = {
        **EDIT,
        "subject": "X",
        "rephrases": ["Who leads X?"],
        "locality": [{"prompt": "The CEO of Z is", "answer": "W"}, {"prompt": "2 + 2 ="}],
        "metadata": {"source": {"page": 3}},
    }
    answer = await submit(api, full, {**EDIT, "prompt": "other"})
    assert answer.status_code == 202
    first, _ = answer.json()["edits"]
    assert set(first) == {"id", "state"}
    again = (await submit(api, EDIT)).json()["edits"][0]
    assert again["supersedes"] == first["id"]
    shown = (await api.get(f"/edits/{first['id']}")).json()
    assert shown["locality"] == [full["locality"][0], {"prompt": "2 + 2 =", "answer": None}]  # type: ignore[index]
    assert {name: shown[name] for name in ("prompt", "subject", "metadata")} == {
        name: full[name] for name in ("prompt", "subject", "metadata")
    }
    assert [event["state"] for event in shown["history"]] == ["queued", "superseded"]
    assert shown["created_at"].endswith("Z")
    page = (await api.get("/edits", params={"limit": 2})).json()
    rest = (await api.get("/edits", params={"cursor": page["next_cursor"]})).json()
    assert page["edits"][0]["id"] == again["id"]
    assert len(page["edits"] + rest["edits"]) == 3
    assert rest["next_cursor"] is None
    queued = (await api.get("/edits", params={"state": "queued", "q": "ceo"})).json()["edits"]
    assert [edit["id"] for edit in queued] == [again["id"]]
    problem(await api.get("/edits/ed_none"), 404)


BAD_EDITS: list[tuple[JSON, str]] = [
    ({"prompt": None}, "edits.0.prompt"),
    ({"prompt": ""}, "edits.0.prompt"),
    ({"prompt": " \n\t"}, "edits.0.prompt"),
    ({"prompt": "x" * 4097}, "edits.0.prompt"),
    ({"prompt": "x\0"}, "edits.0.prompt"),
    ({"prompt": 1}, "edits.0.prompt"),
    ({"target": "  "}, "edits.0.target"),
    ({"target": "x" * 1025}, "edits.0.target"),
    ({"subject": ""}, "edits.0.subject"),
    ({"rephrases": ["x"] * 17}, "edits.0.rephrases"),
    ({"rephrases": ["x", " "]}, "edits.0.rephrases.1"),
    ({"locality": [{"prompt": "x"}] * 17}, "edits.0.locality"),
    ({"locality": [{"prompt": "x", "answer": "\0"}]}, "edits.0.locality.0.answer"),
    ({"locality": [{"answer": "x"}]}, "edits.0.locality.0.prompt"),
    ({"locality": ["x"]}, "edits.0.locality.0"),
    ({"metadata": []}, "edits.0.metadata"),
    ({"metadata": {"x": "y" * 4096}}, "edits.0.metadata"),
    ({"metadata": {"x": ["\0"]}}, "edits.0.metadata"),
    ({"metadata": {"\0": 1}}, "edits.0.metadata"),
    ({"colour": "red"}, "edits.0.colour"),
]


async def test_a_bad_edit_names_its_field(api: httpx.AsyncClient) -> None:
    for changes, field in BAD_EDITS:
        assert list(fields(await submit(api, {**EDIT, **changes}))) == [field], changes
    assert (await api.get("/edits")).json()["edits"] == []


async def test_the_limits_themselves_are_accepted(api: httpx.AsyncClient) -> None:
    metadata = {"k": "y" * (4096 - len('{"k":""}'))}
    big = {
        "prompt": "p" * 4096,
        "target": "é" * 1024,
        "rephrases": ["r"] * 16,
        "locality": [{"prompt": "l", "answer": None}] * 16,
        "metadata": metadata,
    }
    assert (await submit(api, big)).status_code == 202
    many = [{**EDIT, "prompt": f"fact {n}"} for n in range(1000)]
    assert len((await submit(api, *many)).json()["edits"]) == 1000
    assert list(fields(await submit(api, *many, EDIT))) == ["edits"]
    assert list(fields(await submit(api))) == ["edits"]


def raw(prompt: bytes = b'"x"', metadata: bytes = b"{}") -> bytes:
    return b'{"edits": [{"target": "y", "prompt": %s, "metadata": %s}]}' % (prompt, metadata)


BODIES = [
    (b"", 422),
    (b"{", 400),
    (b"\xff\xfe{", 400),
    (raw(prompt=b'"\xff"'), 400),
    (raw(prompt=b'"\\ud800"'), 422),
    (raw(prompt=b'"\\ud83d\\ude00"'), 202),
    (raw(metadata=b'{"x": NaN}'), 422),
    (raw(metadata=b'{"x": 1e999}'), 422),
    (raw(metadata=b'{"x": "\\udfff"}'), 422),
    (raw(metadata=b'{"x": %s1%s}' % (b"[" * 40, b"]" * 40)), 422),
    (raw(metadata=b'{"x": %s1%s}' % (b"[" * 1500, b"]" * 1500)), 400),
    (raw(metadata=b'{"x": %s}' % (b"9" * 5000)), 400),
    (raw(metadata=b'{"x": %s}' % (b"9" * 4000)), 202),
    (b"[]", 422),
    (b"null", 422),
]


async def test_bodies_as_they_come(api: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    for body, status in BODIES:
        response = await api.post("/edits", content=body, headers=headers)
        if status == 202:
            assert response.status_code == 202, response.text
        else:
            problem(response, status)


async def test_a_body_that_is_not_utf8_says_so(api: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    response = await api.post("/edits", content=raw(prompt=b'"\xff"'), headers=headers)
    assert "not UTF-8" in problem(response, 400)["detail"]


async def test_json_must_be_sent_as_json(api: httpx.AsyncClient) -> None:
    for content_type in ("application/x-www-form-urlencoded", "text/plain"):
        response = await api.post("/edits", content=raw(), headers={"content-type": content_type})
        assert content_type in problem(response, 415)["detail"]


async def test_bad_queries_are_named(api: httpx.AsyncClient) -> None:
    for name, value in {
        "state": "lost",
        "limit": "0",
        "cursor": "no cursor",
        "version": "\0",
        "q": "\0",
    }.items():
        assert list(fields(await api.get("/edits", params={name: value}))) == [name]
    problem(await api.get("/edits", params={"limit": "1001"}), 422)
    problem(await api.get("/edits/%00"), 422)
    problem(await api.get("/jobs", params={"cursor": "%%%"}), 422)
    problem(await api.get("/versions", params={"cursor": "é"}), 422)
    problem(await api.get("/nowhere"), 404)
    problem(await api.put("/edits", json={}), 405)


async def test_a_key_gives_the_same_answer_again(api: httpx.AsyncClient) -> None:
    key = {"Idempotency-Key": "k1"}
    answers = await asyncio.gather(*(submit(api, EDIT, **key) for _ in range(5)))
    assert len({answer.text for answer in answers}) == 1
    assert len((await api.get("/edits")).json()["edits"]) == 1
    problem(await submit(api, {**EDIT, "target": "Z"}, **key), 409)
    one, other = [await api.post("/jobs", json={}, headers=key) for _ in range(2)]
    assert one.json() == other.json()
    assert one.headers["location"] == other.headers["location"] == f"/jobs/{one.json()['id']}"
    assert len((await api.get("/jobs")).json()["jobs"]) == 1
    problem(await submit(api, EDIT, **{"Idempotency-Key": ""}), 422)


async def test_jobs_are_started_found_and_shown(api: httpx.AsyncClient) -> None:
    assert "POST /edits first" in problem(await api.post("/jobs", json={}), 409)["detail"]
    (stored,) = (await submit(api, EDIT)).json()["edits"]
    body = {
        "kind": "rebuild",
        "max_edits": 5,
        "edit_ids": [stored["id"]],
        "hparams": {"learning_rate": 0.001, "parameters": ["a.weight"], "max_epochs": 3},
        "activate": False,
        "recheck": "all",
    }
    response = await api.post("/jobs", json=body)
    assert response.status_code == 202
    job = response.json()
    assert {name: job[name] for name in body} == body
    assert (job["state"], job["version"], job["progress"]) == ("pending", None, None)
    assert (await api.get(response.headers["location"])).json() == job
    assert (await api.get("/jobs", params={"state": "pending"})).json()["jobs"] == [job]
    for given, shown in (({"recheck": 7}, 7), ({}, 100)):
        assert (await api.post("/jobs", json=given)).json()["recheck"] == shown
    problem(await api.get("/jobs/job_none"), 404)


BAD_JOBS: list[tuple[JSON, str]] = [
    ({"kind": "shrink"}, "kind"),
    ({"max_edits": 0}, "max_edits"),
    ({"max_edits": "5"}, "max_edits"),
    ({"max_edits": 10**12}, "max_edits"),
    ({"edit_ids": []}, "edit_ids"),
    ({"edit_ids": ["ed_none"]}, "edit_ids.0"),
    ({"edit_ids": ["\0"]}, "edit_ids.0"),
    ({"activate": "yes"}, "activate"),
    ({"hparams": {"learning_rat": 1}}, "hparams.learning_rat"),
    ({"hparams": {"learning_rate": 2}}, "hparams.learning_rate"),
    ({"hparams": {"learning_rate": "0.1"}}, "hparams.learning_rate"),
    ({"hparams": {"learning_rate": True}}, "hparams.learning_rate"),
    ({"hparams": {"batch_size": 1.5}}, "hparams.batch_size"),
    ({"hparams": {"parameters": []}}, "hparams.parameters"),
    ({"hparams": {"parameters": ["\0"]}}, "hparams"),
    ({"hparams": {"dtype": "int4"}}, "hparams.dtype"),
    ({"hparams": []}, "hparams"),
    ({"recheck": -1}, "recheck"),
    ({"recheck": "some"}, "recheck"),
    ({"recheck": True}, "recheck"),
    ({"recheck": 1.5}, "recheck"),
    ({"now": True}, "now"),
]


async def test_a_bad_job_names_its_field(api: httpx.AsyncClient) -> None:
    await submit(api, EDIT)
    for body, field in BAD_JOBS:
        assert list(fields(await api.post("/jobs", json=body))) == [field], body
    assert (await api.get("/jobs")).json()["jobs"] == []


async def test_versions_and_how_their_edits_came_out(
    api: httpx.AsyncClient, database: Database
) -> None:
    await submit(api, EDIT, {**EDIT, "prompt": "other"}, {**EDIT, "prompt": "third"})
    version_id = await published(database)
    listed = (await api.get("/versions")).json()["versions"]
    assert [(v["id"], v["state"], v["parent"], v["edits"]) for v in listed] == [
        ("v1", "published", "v0", 2),
        ("v0", "live", None, 0),
    ]
    shown = (await api.get(f"/versions/{version_id}", params={"limit": 2})).json()
    assert shown["metrics"] == {"reliability": 50.0}
    assert [verdict["reliable"] for verdict in shown["verdicts"]] == [True, False]
    cursor = {"cursor": shown["next_cursor"]}
    (last,) = (await api.get(f"/versions/{version_id}", params=cursor)).json()["verdicts"]
    edit = (await api.get(f"/edits/{last['edit']}")).json()
    assert (edit["version"], edit["job"]) == ("v1", shown["job"])
    assert edit["verdict"] == last
    assert (last["version"], last["formats"]) == (
        "v1",
        {"qa": {"reliable": True, "answer": "so", "generalization": 0.5}},
    )
    problem(await api.get("/versions/v99"), 404)
    problem(await api.get("/versions/v0", params={"cursor": "v99!"}), 422)


async def test_activation_and_readiness(api: httpx.AsyncClient, database: Database) -> None:
    assert (await api.get("/healthz")).status_code == 200
    waiting = await api.get("/readyz")
    assert "v0" in problem(waiting, 503)["detail"]
    assert int(waiting.headers["retry-after"]) > 0
    async with database.transaction() as conn:
        assert await replicas.join(conn, "a", [])
    assert (await api.get("/readyz")).status_code == 200

    await submit(api, EDIT)
    version_id = await published(database)
    answer = await api.post(f"/versions/{version_id}/activate", json={})
    assert answer.status_code == 202
    assert (answer.json()["version"], answer.json()["staging"]) == ("v0", "v1")
    async with database.transaction() as conn:
        await replicas.acknowledge(conn, "a", version_id, "digest", None)
        await serving.commit(conn, version_id, 1, ["a"])
    now = (await api.get("/serving")).json()
    (replica,) = now.pop("replicas")
    assert (now["generation"], now["version"], now["staging"]) == (2, "v1", None)
    assert (replica["id"], replica["state"], replica["resident"]) == ("a", "ready", [])
    assert replica["staged_at"].endswith("Z")
    assert (await api.get("/readyz")).status_code == 200
    async with database.transaction() as conn:
        await replicas.fence(conn, "a")
    problem(await api.get("/readyz"), 503)
    problem(await api.post("/versions/v99/activate"), 404)


async def test_a_database_that_is_away_is_503_with_retry_after() -> None:
    away = Database("postgresql://me:s3cret@127.0.0.1:1/db")
    app = create_api(Settings(_env_file=None), away, Echo())  # type: ignore[call-arg]
    async with serving_app(app) as api:
        for response in (
            await submit(api, EDIT),
            await api.get("/edits"),
            await api.get("/serving"),
            await api.get("/readyz"),
        ):
            problem(response, 503)
            assert int(response.headers["retry-after"]) > 0
            assert "s3cret" not in response.text
        assert (await api.get("/healthz")).status_code == 200


async def test_an_unexpected_error_tells_nothing_of_the_inside(
    api: httpx.AsyncClient, database: Database
) -> None:
    async with database.transaction() as conn:
        await conn.execute(text("DROP TABLE edit_events"))
    assert "edit_events" not in problem(await submit(api, EDIT), 500)["detail"]


async def test_the_interface_describes_itself(api: httpx.AsyncClient) -> None:
    assert (await api.get("/docs")).status_code == 200
    paths = (await api.get("/openapi.json")).json()["paths"]
    assert {"/edits", "/jobs/{job_id}", "/versions/{version_id}/activate", "/serving"} <= set(paths)
