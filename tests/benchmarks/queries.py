"""Queries: the replica's engine (continuous batching) against `model.generate`, one by one.

Both answer the same prompts, greedily, in this process, on the same thread; medians of several
runs. A second engine row has a quarter of the prompts on each of four versions: what keeping
versions side by side costs.

    python -m tests.benchmarks.queries --json FILE
"""

import argparse
import asyncio
import json
import platform
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.client import read_jsonl
from service.inference import CompletionRequest
from service.replica.generation import Sizes
from service.replica.transformers_engine import TransformersEngine
from service.settings import DEMO_MODEL

PROMPTS = [fact["prompt"] for fact in read_jsonl(DEMO_MODEL.parent / "unedited.jsonl")[:64]]
MAX_TOKENS = 16
RUNS = 5
VERSIONS = 4
TUNED = "model.layers.1.mlp.down_proj.weight"

Answers = list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    target = parser.parse_args().json
    result = asyncio.run(measure())
    show(result)
    if target:
        target.write_text(json.dumps(result, indent=2) + "\n")


async def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    engine = TransformersEngine.load(DEMO_MODEL, Sizes(), threads=1)
    weight = engine.model("v0").get_parameter(TUNED).detach()
    for number in range(1, VERSIONS):
        engine.stage(f"v{number}", [(TUNED, weight.clone())])
    one_by_one = sequential()
    sides: dict[str, Callable[[], Awaitable[Answers]]] = {
        "generate, one by one": one_by_one,
        "engine, one version": lambda: batched(engine, 1),
        f"engine, {VERSIONS} versions": lambda: batched(engine, VERSIONS),
    }
    seconds, answers = await timed(sides)
    await engine.close()
    assert all(given == answers["generate, one by one"] for given in answers.values())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = medians["generate, one by one"]
    return {
        "prompts": len(PROMPTS),
        "runs": RUNS,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": medians,
        "speedup": {name: base / median for name, median in medians.items()},
    }


async def timed(
    sides: dict[str, Callable[[], Awaitable[Answers]]],
) -> tuple[dict[str, list[float]], dict[str, Answers]]:
    """Every side in turn, so that a slow moment of the machine meets all; one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, Answers] = {}
    for turn in range(RUNS + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            answers[name] = await side()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds, answers


def sequential() -> Callable[[], Awaitable[Answers]]:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)

    def answer(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    async def run() -> Answers:
        with torch.no_grad():
            return [answer(prompt) for prompt in PROMPTS]

    return run


async def batched(engine: TransformersEngine, versions: int) -> Answers:
    async def answer(index: int) -> str:
        request = CompletionRequest(
            f"v{index % versions}", PROMPTS[index], MAX_TOKENS, temperature=0.0
        )
        return "".join([chunk.text async for chunk in engine.generate(request)])

    return list(await asyncio.gather(*map(answer, range(len(PROMPTS)))))


def show(result: dict[str, Any]) -> None:
    table = Table("side", "seconds", "speedup", box=None)
    for name, seconds in result["seconds"].items():
        table.add_row(name, f"{seconds:.2f}", f"{result['speedup'][name]:.1f}x")
    console = Console()
    console.print(table)
    console.print(f"{result['prompts']} prompts, median of {result['runs']} runs, {result['cpu']}")


if __name__ == "__main__":
    main()
