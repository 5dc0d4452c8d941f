"""The transformers engine on a tiny random model, against the model's own `generate`."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import InvalidInput, Unavailable, VersionRejected
from service.inference import Chunk, CompletionRequest
from service.replica.generation import Sizes
from service.replica.transformers_engine import TransformersEngine
from tests.tiny_model import CONTEXT, SHAPE, TUNED, save_tiny_model, tuned_tensor

SIZES = Sizes(kv_tokens=2048)
PROMPTS = [f"the capital {n} of{' France' * (n % 5)}" for n in range(32)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(model_path: Path) -> Iterator[TransformersEngine]:
    yield TransformersEngine.load(model_path, SIZES, threads=1)
    assert not generation_threads()


def generation_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if "_run_generation_loop" in t.name]


def run(engine: TransformersEngine, work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        try:
            return await work()
        finally:
            await engine.close()

    return asyncio.run(main())


async def ask(
    engine: TransformersEngine, prompt: str, version_id: str = "v0", **fields: Any
) -> tuple[str, Chunk]:
    request = CompletionRequest(version_id, prompt, **{"temperature": 0.0, **fields})
    chunks = [chunk async for chunk in engine.generate(request)]
    assert {chunk.version_id for chunk in chunks} == {version_id}
    assert [chunk.finish_reason is None for chunk in chunks[-2:]] in ([True, False], [False])
    return "".join(chunk.text for chunk in chunks), chunks[-1]


def reference(
    engine: TransformersEngine, model_path: Path, prompt: str, tokens: int, version_id: str = "v0"
) -> str:
    """What transformers' own `generate` answers, greedily."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    model = engine.model(version_id)
    with torch.no_grad():
        ids = model.generate(**encoded, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))[len(prompt) :]


def test_greedy_equals_generate_for_two_versions_at_once(
    engine: TransformersEngine, model_path: Path
) -> None:
    engine.stage("v1", [(TUNED, tuned_tensor(1))])
    asked = [(prompt, version_id) for prompt in PROMPTS for version_id in ("v0", "v1")]

    async def work() -> list[tuple[str, Chunk]]:
        return await asyncio.gather(*(ask(engine, p, v, max_tokens=12) for p, v in asked))

    answers = run(engine, work)
    expected = [reference(engine, model_path, prompt, 12, v) for prompt, v in asked]
    assert [text for text, _ in answers] == expected
    assert expected[::2] != expected[1::2]


def test_a_version_shares_all_but_the_edited_tensor(engine: TransformersEngine) -> None:
    engine.stage("v1", [(TUNED, tuned_tensor(1))])
    base = dict(engine.model("v0").named_parameters())
    version = dict(engine.model("v1").named_parameters())
    apart = [name for name in base if base[name].data_ptr() != version[name].data_ptr()]
    assert apart == [TUNED]
    assert torch.equal(version[TUNED], tuned_tensor(1))


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [("model.nothing", SHAPE, "no parameter 'model.nothing'"), (TUNED, (2, 2), r"\(2, 2\)")],
)
def test_tensors_of_another_model_are_rejected(
    engine: TransformersEngine, name: str, shape: tuple[int, int], problem: str
) -> None:
    with pytest.raises(VersionRejected, match=problem):
        engine.stage("v1", [(name, torch.zeros(shape))])


def test_a_tensor_that_fits_is_adopted_and_one_that_does_not_is_cast(
    engine: TransformersEngine,
) -> None:
    given = tuned_tensor(1)
    engine.stage("v1", [(TUNED, given)])
    assert engine.model("v1").get_parameter(TUNED).data_ptr() == given.data_ptr()
    engine.stage("v2", [(TUNED, given.bfloat16())])
    assert torch.equal(engine.model("v2").get_parameter(TUNED), given.bfloat16().float())


def test_staging_goes_on_beside_generation(engine: TransformersEngine, model_path: Path) -> None:
    async def work() -> tuple[str, str]:
        request = CompletionRequest("v0", "the capital", max_tokens=60, temperature=0.0)
        chunks = engine.generate(request)
        text = (await anext(chunks)).text
        await asyncio.to_thread(engine.stage, "v1", [(TUNED, tuned_tensor(1))])
        staged, _ = await ask(engine, "the capital", "v1", max_tokens=8)
        return text + "".join([chunk.text async for chunk in chunks]), staged

    first, second = run(engine, work)
    assert first == reference(engine, model_path, "the capital", 60)
    assert second == reference(engine, model_path, "the capital", 8, "v1")


def test_token_counts_and_finish_reason(engine: TransformersEngine) -> None:
    _, last = run(engine, lambda: ask(engine, "abc", max_tokens=5))
    assert (last.prompt_tokens, last.completion_tokens, last.finish_reason) == (3, 5, "length")


def test_end_of_sequence_is_not_in_the_text(engine: TransformersEngine) -> None:
    # All logits equal: the argmax is token 0, the end.
    engine.stage("v1", [("lm_head.weight", torch.zeros_like(engine.model("v0").lm_head.weight))])
    text, last = run(engine, lambda: ask(engine, "abc", "v1", max_tokens=40))
    assert (text, last.finish_reason, last.completion_tokens) == ("", "stop", 1)


def test_stop_string_cuts_and_frees(engine: TransformersEngine, model_path: Path) -> None:
    whole = reference(engine, model_path, "the capital", 40)
    stop = whole[9:12]
    text, last = run(engine, lambda: ask(engine, "the capital", max_tokens=40, stop=(stop,)))
    assert text == whole[: whole.index(stop)]
    assert last.finish_reason == "stop"
    assert last.completion_tokens < 40


def test_a_seed_gives_the_same_answer_in_any_batch(engine: TransformersEngine) -> None:
    async def work() -> list[str]:
        alone = await ask(engine, "abc", seed=7, temperature=1.0, max_tokens=12)
        crowd = (ask(engine, prompt, temperature=1.0, max_tokens=12) for prompt in PROMPTS)
        among, *_others = await asyncio.gather(
            ask(engine, "abc", seed=7, temperature=1.0, max_tokens=12), *crowd
        )
        other = await ask(engine, "abc", seed=8, temperature=1.0, max_tokens=12)
        return [alone[0], among[0], other[0]]

    alone, among, other = run(engine, work)
    assert alone == among != other


def test_a_tiny_nucleus_is_greedy(engine: TransformersEngine, model_path: Path) -> None:
    text, _ = run(engine, lambda: ask(engine, "abc", temperature=1.0, top_p=1e-6, max_tokens=12))
    assert text == reference(engine, model_path, "abc", 12)


def test_the_lowest_temperature_is_greedy(engine: TransformersEngine, model_path: Path) -> None:
    text, _ = run(engine, lambda: ask(engine, "abc", temperature=1e-40, max_tokens=12))
    assert text == reference(engine, model_path, "abc", 12)


def test_more_requests_than_the_cache_holds_all_finish(
    engine: TransformersEngine, model_path: Path
) -> None:
    prompts = ["x" * 300 + str(n) for n in range(12)]

    async def work() -> list[tuple[str, Chunk]]:
        return await asyncio.gather(*(ask(engine, p, max_tokens=100) for p in prompts))

    answers = run(engine, work)
    assert [text for text, _ in answers] == [
        reference(engine, model_path, prompt, 100) for prompt in prompts
    ]


def test_a_request_given_up_frees_its_place(engine: TransformersEngine, model_path: Path) -> None:
    async def give_up(prompt: str) -> None:
        request = CompletionRequest("v0", prompt, max_tokens=400, temperature=0.0)
        chunks = engine.generate(request)
        await anext(chunks)
        await chunks.aclose()

    async def work() -> tuple[str, Chunk]:
        for _ in range(8):
            await asyncio.gather(*(give_up(prompt) for prompt in PROMPTS))
        return await ask(engine, "y" * 400, max_tokens=CONTEXT - 400)

    text, last = run(engine, work)
    assert text == reference(engine, model_path, "y" * 400, CONTEXT - 400)
    assert last.completion_tokens == CONTEXT - 400


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field", "number"),
    [
        ("x" * 600, 1, "prompt", "600"),
        ("x" * 500, 100, "max_tokens", "at most 12"),
        ("", 1, "prompt", "empty"),
        ((1, 99_999), 1, "prompt", "99999"),
    ],
)
def test_what_does_not_fit_is_the_callers_mistake(
    engine: TransformersEngine, prompt: Any, max_tokens: int, field: str, number: str
) -> None:
    with pytest.raises(InvalidInput, match=number) as caught:
        run(engine, lambda: ask(engine, prompt, max_tokens=max_tokens))
    assert [error.field for error in caught.value.errors] == [field]


def test_an_error_in_the_generation_thread_reaches_those_who_wait(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the accelerator is gone")

    async def work() -> None:
        monkeypatch.setattr(type(engine.model("v0")), "forward", broken)
        asked = await asyncio.gather(
            *(ask(engine, prompt) for prompt in PROMPTS), return_exceptions=True
        )
        assert [type(error) for error in asked] == [Unavailable] * len(PROMPTS)
        # The thread tells those who wait, and only then ends and says why.
        with pytest.raises(Unavailable, match="accelerator is gone"):
            await checked(engine)

    run(engine, work)


async def checked(engine: TransformersEngine) -> None:
    """Again and again, until it raises."""
    async with asyncio.timeout(60):
        while True:
            engine.check()
            await asyncio.sleep(0)


def test_an_idle_engine_gives_its_thread_back_and_starts_again(model_path: Path) -> None:
    engine = TransformersEngine.load(model_path, Sizes(kv_tokens=512, idle_s=0.01), threads=1)

    async def work() -> list[str]:
        first, _ = await ask(engine, "abc", max_tokens=8)
        (thread,) = generation_threads()
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
        second, _ = await ask(engine, "abc", max_tokens=8)
        return [first, second]

    first, second = run(engine, work)
    assert first == second
