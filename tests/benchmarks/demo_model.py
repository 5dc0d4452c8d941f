"""The demo model in this process: edit it with the project's own loop, and ask what it says.

Answers come from the engine that serves, judged as a job judges them.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.client import read_jsonl
from service.coordinator.examination import Examination, examine
from service.inference import Completion, CompletionRequest, Inference
from service.replica.generation import Sizes
from service.replica.transformers_engine import TransformersEngine
from service.settings import DEMO_MODEL
from workers import examples, formats, frozen_prefix, locft, models, presets
from workers.contract import Anchor, EditRecord, Hparams, LocalityProbe
from workers.examples import Example
from workers.locft import State
from workers.progress import ignore

FOLDER = DEMO_MODEL.parent
Tensors = Mapping[str, Tensor]
"""Tuned parameters by name."""


@dataclass(frozen=True)
class Edited:
    tensors: Tensors
    state: State
    prefix_s: float
    train_s: float

    @property
    def total_s(self) -> float:
        return self.prefix_s + self.train_s


def hparams(**changes: Any) -> Hparams:
    """The demo's own, with changes."""
    return presets.load(models.check(DEMO_MODEL), None, changes)


def edits() -> list[EditRecord]:
    """The 100 edits of the demo, with two held-out phrasings each."""
    rows = read_jsonl(FOLDER / "edits.jsonl")
    return [
        EditRecord(id=f"ed_{n}", prompt=r["prompt"], target=r["target"], rephrases=r["rephrases"])
        for n, r in enumerate(rows)
    ]


def unedited() -> list[LocalityProbe]:
    """200 facts that no edit is about, and their answers."""
    return [LocalityProbe(**row) for row in read_jsonl(FOLDER / "unedited.jsonl")]


class DemoModel:
    """The base model, its tokenizer, and an engine with versions of it."""

    def __init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
        self._engine = TransformersEngine.load(DEMO_MODEL, Sizes(), torch.get_num_threads())
        self._runner = asyncio.Runner()
        self._number = 0

    def model(self, tensors: Tensors) -> Any:
        """A copy of the model with these tuned tensors, to be trained."""
        model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
        with torch.no_grad():
            for name, value in tensors.items():
                model.get_parameter(name).copy_(value)
        return model.eval()

    def samples(
        self, chosen: Hparams, edits: Sequence[EditRecord], anchors: Sequence[Anchor] = ()
    ) -> list[Example]:
        names = formats.chosen(chosen.formats, self.tokenizer)
        return examples.tokenize(edits, self.tokenizer, 512, names, anchors)

    def edit(self, chosen: Hparams, samples: Sequence[Example], start: Tensors) -> Edited:
        """The project's loop, from the tuned tensors `start` (none: the base model's)."""
        model = self.model(start)
        depth = frozen_prefix.depth_of(chosen.parameters, model.config.num_hidden_layers)
        began = time.perf_counter()
        with TemporaryDirectory() as folder:
            states = frozen_prefix.HiddenStates(
                samples, model.config.hidden_size, model.dtype, 1 << 30, Path(folder) / "prefix"
            )
            frozen_prefix.run(model.get_decoder(), depth, samples, states)
            ran = time.perf_counter()
            stepper = locft.LocalStepper(model, chosen, depth, states)
            state = locft.train(samples, chosen, stepper, ignore)
        trained = time.perf_counter()
        tensors = {name: model.get_parameter(name).detach() for name in chosen.parameters}
        return Edited(tensors, state, ran - began, trained - ran)

    def judge(
        self, tensors: Tensors, edits: Sequence[EditRecord], chosen: Hparams
    ) -> dict[str, float]:
        """reliability, generalization (each by format), and locality over the unedited facts."""
        probe = EditRecord(id="unedited", prompt="-", target="-", locality=tuple(unedited()))
        names = formats.chosen(chosen.formats, self.tokenizer)
        asked = self._examine(tensors, edits, formats.renderings(names, self.tokenizer))
        kept = self._examine(tensors, [probe], formats.RAW)
        return {**asked.metrics, "locality": kept.metrics["locality"]}

    def lost(self, tensors: Tensors, edits: Sequence[EditRecord]) -> list[EditRecord]:
        """Those that no longer hold."""
        verdicts = self._examine(tensors, edits, formats.RAW).verdicts
        pairs = zip(edits, verdicts, strict=True)
        return [edit for edit, verdict in pairs if not verdict.reliable]

    def _examine(
        self, tensors: Tensors, edits: Sequence[EditRecord], renderings: formats.Renderings
    ) -> Examination:
        self._number += 1
        version = f"v{self._number}"
        self._engine.stage(version, tensors.items())
        inference: Inference = _Direct(self._engine)

        async def ask() -> Examination:
            asked = await examine(inference, version, version, edits, (), renderings)
            await self._engine.drop(version)
            return asked

        return self._runner.run(ask())


class _Direct:
    """`Inference` straight from an engine."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine

    async def complete(self, request: CompletionRequest) -> Completion:
        text = ""
        async for chunk in self._engine.generate(request):
            text += chunk.text
            last = chunk
        assert last.finish_reason is not None
        return Completion(
            last.version_id,
            text,
            last.finish_reason,
            last.prompt_tokens,
            last.completion_tokens,
            None,
        )

    def stream(self, request: CompletionRequest) -> Any:
        return self._engine.generate(request)
