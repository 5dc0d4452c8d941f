"""OpenAI's protocol end to end in one process: HTTP, admission, a real engine, PostgreSQL."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from service.api.app import create_api
from service.errors import NotFound, Unavailable
from service.inference import Chunk, Completion, CompletionRequest, Inference
from service.replica.bank import VersionBank
from service.replica.generation import Sizes
from service.replica.local import LocalInference
from service.replica.transformers_engine import TransformersEngine
from service.settings import Settings
from service.store.database import Database
from tests.tiny_model import publish, register, save_tiny_model, stored

pytestmark = pytest.mark.anyio

FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    path = save_tiny_model(tmp_path_factory.mktemp("model"))
    return TransformersEngine.load(path, Sizes(kv_tokens=1024), threads=1)


@pytest.fixture
async def inference(engine: TransformersEngine, tmp_path: Path) -> AsyncIterator[Inference]:
    publish(str(tmp_path), "v1", FINGERPRINT)
    yield LocalInference(
        engine, VersionBank(engine, stored(str(tmp_path), FINGERPRINT), FINGERPRINT, capacity=2)
    )
    await engine.close()


@asynccontextmanager
async def serve(database_url: str, inference: Inference) -> AsyncIterator[httpx.AsyncClient]:
    database = Database(database_url)
    await register(database, FINGERPRINT, "v1")
    app = create_api(Settings(max_new_tokens=64), database, inference)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://errata") as client,
    ):
        yield client


@pytest.fixture
async def client(database_url: str, inference: Inference) -> AsyncIterator[httpx.AsyncClient]:
    async with serve(database_url, inference) as connected:
        yield connected


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    greedy = {"prompt": "the capital of", "temperature": 0, "max_tokens": 8}
    return await client.post("/v1/completions", json={**greedy, **body})


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_an_answer(client: httpx.AsyncClient) -> None:
    response = await post(client)
    assert response.status_code == 200
    assert response.headers["x-errata-version"] == "v0"
    assert response.headers["x-errata-generation"].isdigit()
    answer = response.json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert (answer["model"], answer["system_fingerprint"]) == ("errata@v0", "errata-v0")
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["text"]
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


async def test_versions_by_name(client: httpx.AsyncClient) -> None:
    default, base, edited = [
        (await post(client, model=model)).json() for model in ("errata", "errata@base", "errata@v1")
    ]
    assert default["choices"] == base["choices"] != edited["choices"]
    assert edited["model"] == "errata@v1"


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["errata", "errata@v1", "errata@base"]


async def test_a_stream_says_what_the_whole_answer_says(client: httpx.AsyncClient) -> None:
    whole = (await post(client)).json()
    response = await post(client, stream=True, stream_options={"include_usage": True})
    assert response.headers["x-errata-version"] == "v0"
    *parts, last = events(response)
    assert {part["id"] for part in [*parts, last]} == {parts[0]["id"]}
    assert "".join(part["choices"][0]["text"] for part in parts) == whole["choices"][0]["text"]
    assert [part["choices"][0]["finish_reason"] for part in parts[-2:]] == [None, "length"]
    assert {part["usage"] for part in parts} == {None}
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]


async def test_a_stream_without_usage_has_no_such_field(client: httpx.AsyncClient) -> None:
    assert all("usage" not in part for part in events(await post(client, stream=True)))


async def test_many_prompts_and_choices(client: httpx.AsyncClient) -> None:
    body = {"prompt": ["the capital", "Paris is"], "n": 2, "seed": 5, "temperature": 1.0}
    whole = (await post(client, **body)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert whole["choices"][0]["text"] != whole["choices"][1]["text"]
    alone = [(await post(client, **{**body, "prompt": each})).json() for each in body["prompt"]]
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert whole["usage"][count] == sum(answer["usage"][count] for answer in alone)
    texts = dict.fromkeys(range(4), "")
    for part in events(await post(client, **body, stream=True)):
        texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert list(texts.values()) == [choice["text"] for choice in whole["choices"]]


async def test_token_prompts(client: httpx.AsyncClient) -> None:
    one = (await post(client, prompt=[5, 6, 7])).json()
    two = (await post(client, prompt=[[5, 6, 7], [8]])).json()
    assert one["usage"]["prompt_tokens"] == 3
    assert two["usage"]["prompt_tokens"] == 4
    assert one["choices"][0]["text"] == two["choices"][0]["text"]


async def test_a_stop_string(client: httpx.AsyncClient) -> None:
    whole = (await post(client, max_tokens=24)).json()["choices"][0]["text"]
    (choice,) = (await post(client, max_tokens=24, stop=whole[6:8])).json()["choices"]
    assert choice["text"] == whole[: whole.index(whole[6:8])]
    assert choice["finish_reason"] == "stop"


SCORED = {"echo": True, "logprobs": 2, "max_tokens": 1}


def plain_logprobs(engine: TransformersEngine, version_id: str, ids: list[int]) -> torch.Tensor:
    """Of every token at every place, by the model's own forward pass."""
    with torch.no_grad():
        return engine.model(version_id)(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize(("model", "version_id"), [("errata@base", "v0"), ("errata@v1", "v1")])
async def test_a_scored_prompt(
    client: httpx.AsyncClient, engine: TransformersEngine, model: str, version_id: str
) -> None:
    ids = [5 + n % 250 for n in range(300)]
    generating = asyncio.create_task(post(client, model=model, max_tokens=24))
    scored = (await post(client, model=model, prompt=ids, **SCORED)).json()
    (choice,) = scored["choices"]
    logprobs = choice["logprobs"]
    assert (await generating).status_code == 200
    assert scored["usage"] == {"prompt_tokens": 300, "completion_tokens": 1, "total_tokens": 301}
    expected = plain_logprobs(engine, version_id, ids)
    own = [expected[place, token].item() for place, token in enumerate(ids[1:])]
    best = expected.max(-1).values.tolist()
    assert logprobs["token_logprobs"] == pytest.approx([None, *own, best[-1]], abs=1e-4)
    assert logprobs["top_logprobs"][0] is None
    assert [max(top.values()) for top in logprobs["top_logprobs"][1:]] == pytest.approx(
        best, abs=1e-4
    )
    assert {len(top) for top in logprobs["top_logprobs"][1:]} == {2}
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 301


async def test_a_scored_text_begins_with_the_prompt(client: httpx.AsyncClient) -> None:
    plain = (await post(client, max_tokens=1)).json()["choices"][0]
    for max_tokens, answer in ((1, plain["text"]), (0, "")):
        body = {**SCORED, "max_tokens": max_tokens, "logprobs": 0}
        choice = (await post(client, **body)).json()["choices"][0]
        assert choice["text"] == "the capital of" + answer
        assert choice["logprobs"]["tokens"][:3] == ["the", " capital", " of"]
        assert choice["logprobs"]["text_offset"][:3] == [0, 3, 11]
        assert set(map(str, choice["logprobs"]["top_logprobs"])) == {"None"}
        assert choice["finish_reason"] == "length"


async def test_tokens_that_are_no_text_of_their_own_are_named_by_id(
    client: httpx.AsyncClient, engine: TransformersEngine
) -> None:
    choice = (await post(client, prompt="é", **SCORED)).json()["choices"][0]
    assert all(token.startswith("token_id:") for token in choice["logprobs"]["tokens"][:2])
    assert choice["text"].startswith("é")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": "x" * 600}, "prompt"),
    ({"prompt": [99_999]}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 65}, "max_tokens"),
    ({"max_tokens": "8"}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 9}, "n"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"echo": True}, "echo"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": 6, "echo": True}, "logprobs"),
    ({**SCORED, "max_tokens": 2}, "max_tokens"),
    ({**SCORED, "n": 2}, "n"),
    ({**SCORED, "stop": "x"}, "stop"),
    ({**SCORED, "temperature": 0.5}, "temperature"),
    ({**SCORED, "stream": True}, "stream"),
    ({"best_of": 2}, "best_of"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -0.5}, "frequency_penalty"),
    ({"suffix": "x"}, "suffix"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"temprature": 1}, "temprature"),
    ({"stream_options": {"include_usage": True}}, "body"),
]


async def test_bad_input_names_the_field(client: httpx.AsyncClient) -> None:
    for body, field in BAD:
        for stream in {False, "stream_options" not in body}:
            response = await post(client, **{"stream": stream, **body})
            assert response.status_code == 422, response.text
            assert response.headers["content-type"] == "application/problem+json"
            assert [error["field"] for error in response.json()["errors"]] == [field], body


async def test_neutral_values_are_accepted(client: httpx.AsyncClient) -> None:
    response = await post(
        client,
        echo=False,
        logprobs=None,
        best_of=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        suffix=None,
        logit_bias={},
        user="u",
        n=None,
        stop=None,
    )
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_no_such_model(client: httpx.AsyncClient, stream: bool) -> None:
    for model in ("gpt-4", "errata@v7", "errata@", "errata@../v1"):
        response = await post(client, model=model, stream=stream)
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"


class Scripted:
    """Inference that gives these chunks, or raises these errors, in order."""

    def __init__(self, *script: Chunk | Exception) -> None:
        self._script = script

    async def complete(self, request: CompletionRequest) -> Completion:
        chunks = [chunk async for chunk in self.stream(request)]
        return Completion(chunks[0].version_id, chunks[0].text, "stop", 1, 1)

    async def stream(self, _request: CompletionRequest) -> AsyncIterator[Chunk]:
        for step in self._script:
            if isinstance(step, Exception):
                raise step
            yield step


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"), [(Unavailable("no replica"), 503), (NotFound("no v1"), 404)]
)
async def test_an_error_before_the_first_token_has_its_status(
    database_url: str, error: Exception, status: int, stream: bool
) -> None:
    async with serve(database_url, Scripted(error)) as client:
        response = await post(client, stream=stream)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"


async def test_an_error_in_a_stream_is_told_and_the_stream_not_done(database_url: str) -> None:
    script = Scripted(Chunk("v0", "a"), Unavailable("the replica ended"))
    async with serve(database_url, script) as client:
        response = await post(client, stream=True)
    first, second = [json.loads(e.removeprefix("data: ")) for e in response.text.split("\n\n")[:2]]
    assert first["choices"][0]["text"] == "a"
    assert second == {"error": {"message": "the replica ended", "type": "Unavailable"}}
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_another_versions_answer_is_never_shown(database_url: str, stream: bool) -> None:
    wrong = Scripted(Chunk("v9", "wrong", "stop"))
    async with serve(database_url, wrong) as client:
        response = await post(client, stream=stream)
    assert response.status_code == 500
    assert "wrong" not in response.text
