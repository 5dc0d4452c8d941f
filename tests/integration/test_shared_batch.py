"""Several versions in one continuous batch over one KV cache, against `generate` of each alone."""

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from service.inference import CompletionRequest
from service.replica.generation import Sizes
from service.replica.transformers_engine import TransformersEngine
from service.replica.versioned import BatchRows, ResidentVersion
from tests.architectures import tiny
from tests.tiny_model import byte_tokenizer

DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
QUERY = [f"model.layers.2.self_attn.q_proj.{part}" for part in ("weight", "bias")]
EDITS = {
    "Qwen2ForCausalLM": [
        [DOWN, *QUERY],
        [DOWN, NORM, "model.layers.0.input_layernorm.weight"],
        ["lm_head.weight", "model.embed_tokens.weight"],
    ],
    "Qwen2MoeForCausalLM": [
        ["model.layers.1.mlp.experts.down_proj", *QUERY],
        ["model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.gate_up_proj"],
        ["model.layers.2.mlp.shared_expert.down_proj.weight"],
    ],
    # Its query norm has the rows behind the heads, and its lm_head is its embedding.
    "Gemma3ForCausalLM": [["model.layers.1.self_attn.q_norm.weight", DOWN], [NORM], [DOWN]],
}
Prompt = tuple[int, ...]

tokenizer = cache(byte_tokenizer)


def make_engine(architecture: str = "Qwen2ForCausalLM", **sizes: Any) -> TransformersEngine:
    """The base and a version for each of the edits, whose answers all differ."""
    torch.set_num_threads(1)
    model = tiny(architecture)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        # A large embedding that is the lm_head too would repeat every token.
        if "embed" not in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    engine = TransformersEngine(model, tokenizer(), Sizes(**{"kv_tokens": 2048, **sizes}))
    for number, names in enumerate(EDITS[architecture], 1):
        engine.stage(f"v{number}", tensors(engine, number, names))
    return engine


def tensors(
    engine: TransformersEngine, seed: int, names: Sequence[str] = (DOWN,)
) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = engine.model("v0")
    shapes = [base.get_parameter(name).shape for name in names]
    return [
        (name, torch.randn(shape, generator=generator) * 0.5)
        for name, shape in zip(names, shapes, strict=True)
    ]


def run(engine: TransformersEngine, work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        try:
            return await work()
        finally:
            await engine.close()

    return asyncio.run(main())


async def ask(engine: TransformersEngine, version_id: str, prompt: Prompt, tokens: int) -> str:
    request = CompletionRequest(version_id, prompt, tokens, temperature=0.0)
    return "".join([chunk.text async for chunk in engine.generate(request)])


def expected(engine: TransformersEngine, version_id: str, prompt: Prompt, tokens: int) -> str:
    """By transformers' own `generate`, of that version alone."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        answer = engine.model(version_id).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    text = str(tokenizer().decode(answer[0], skip_special_tokens=True))
    return text[len(tokenizer().decode(prompt)) :]


def prompt(number: int, length: int) -> Prompt:
    """Letters only, so that no character begins in the prompt and ends in the answer."""
    letters = "".join(chr(ord("a") + (number * 7 + place * 3) % 26) for place in range(length))
    return tuple(tokenizer()(letters)["input_ids"])


@pytest.mark.parametrize("architecture", EDITS)
def test_each_request_in_one_batch_is_its_versions_own(architecture: str) -> None:
    """Some prompts are longer than a forward pass: they are read while others are answered."""
    engine = make_engine(architecture, batch_tokens=48)
    asked = [
        (f"v{version}", prompt(number, 3 + 17 * number), 3 + number)
        for number in range(6)
        for version in range(4)
    ]
    answers = run(engine, lambda: asyncio.gather(*(ask(engine, *each) for each in asked)))
    assert answers == [expected(engine, *each) for each in asked]
    assert len(set(answers[-4:])) == 4


def test_staging_and_dropping_disturb_no_answer() -> None:
    engine = make_engine()
    asked = [(f"v{number % 2}", prompt(number, 12), 40) for number in range(4)]
    stop = threading.Event()

    def stage(loop: asyncio.AbstractEventLoop) -> int:
        """On a worker thread, one version after another, with edits in several modules."""
        count = 0
        while not stop.is_set():
            version_id = f"v{100 + count}"
            engine.stage(version_id, tensors(engine, count, [DOWN, NORM, *QUERY]))
            asyncio.run_coroutine_threadsafe(engine.drop(version_id), loop).result()
            count += 1
        return count

    async def work() -> tuple[list[str], int]:
        staging = asyncio.create_task(asyncio.to_thread(stage, asyncio.get_running_loop()))
        answers = await asyncio.gather(*(ask(engine, *each) for each in asked))
        stop.set()
        return answers, await staging

    answers, staged = run(engine, work)
    assert staged > 3
    assert answers == [expected(engine, *each) for each in asked]


def test_a_version_that_comes_back_finds_only_its_own_cache() -> None:
    """Its requests were given up, so it was dropped while one was still in the running batch."""
    engine = make_engine()
    prompts = [prompt(number, 40) for number in range(3)]

    async def give_up(tokens: Prompt) -> None:
        chunks = engine.generate(CompletionRequest("v1", tokens, 60, temperature=0.0))
        await anext(chunks)
        await chunks.aclose()

    async def work() -> list[str]:
        await asyncio.gather(*map(give_up, prompts))
        await engine.drop("v1")
        await ask(engine, "v0", prompts[0], 20)
        engine.stage("v1", tensors(engine, 1, EDITS["Qwen2ForCausalLM"][0]))
        return await asyncio.gather(*(ask(engine, "v1", each, 30) for each in prompts))

    answers = run(engine, work)
    assert answers == [expected(engine, "v1", each, 30) for each in prompts]


@pytest.mark.parametrize("at_once", [False, True])
def test_a_shared_prompt_is_read_once_a_version(
    at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    read: Counter[str] = Counter()
    lay_out = BatchRows.lay_out

    def counting(rows: BatchRows, requests: Sequence[tuple[ResidentVersion, int, bool]]) -> None:
        for version, count, _ in requests:
            read[version.id] += count if count > 1 else 0
        lay_out(rows, requests)

    monkeypatch.setattr(BatchRows, "lay_out", counting)
    asked = [(f"v{number % 3}", prompt(0, 100), 8) for number in range(9)]

    async def work() -> list[str]:
        if at_once:
            first = await asyncio.gather(*(ask(engine, *each) for each in asked[:3]))
            return first + await asyncio.gather(*(ask(engine, *each) for each in asked[3:]))
        return [await ask(engine, *each) for each in asked]

    answers = run(engine, work)
    assert answers == [expected(engine, *each) for each in asked]
    assert len(set(answers)) == 3
    # The prompt once, then for two more requests what follows its last full page.
    assert read == dict.fromkeys(("v0", "v1", "v2"), 100 + 2 * (100 % 16))
