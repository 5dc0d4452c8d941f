"""The location search: which module of which layer of a model takes edits best.

Each location is tuned by LocFT-BF on a sample of edits, and the model is then asked for what the
edits say, for that in other words, and for what they should leave alone. Afterwards the weights are
the model's own again, bit for bit. Layers are searched upwards, so the frozen prefix of one depth
is extended to the next and shared by all locations there.

Knows one process and one device; nothing of files but the model's, nor of which location to choose.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workers import evaluation, fisher, frozen_prefix
from workers.answering import Answerer
from workers.contract import EditRecord, Hparams
from workers.errors import TrainingFailed
from workers.examples import Example, tokenize
from workers.frozen_prefix import HiddenStates
from workers.location_choice import Figures, Outcome, Trial
from workers.locations import Location
from workers.locft import LocalStepper, State, train
from workers.models import ModelFacts, fingerprint
from workers.selection import select

CACHE_BUDGET_BYTES = 8 << 30

Watch = Callable[[Trial, State], None]
"""Called after each mini-batch of a trial."""


def settings(facts: ModelFacts, hparams: Hparams, edits: Sequence[EditRecord]) -> dict[str, Any]:
    """What a trial's figures depend on, besides the trial. Reads all of the model's files."""
    sample = "\n".join(edit.model_dump_json() for edit in edits)
    return {
        "model": fingerprint(facts.path),
        "sample": f"sha256:{hashlib.sha256(sample.encode()).hexdigest()}",
        **hparams.model_dump(
            include={"batch_size", "max_epochs", "loss_threshold", "seed", "dtype"}
        ),
    }


class Search:
    """A model in memory, and the sample that it is edited with."""

    def __init__(
        self, facts: ModelFacts, hparams: Hparams, edits: Sequence[EditRecord], scratch: Path
    ) -> None:
        """`hparams` without its location; `scratch` takes a prefix that is too big for memory.

        Raises `TrainingFailed` for an edit that cannot be trained or a prompt that is too long.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, hparams.dtype)
        tokenizer = AutoTokenizer.from_pretrained(facts.path)
        self._examples = tokenize(edits, tokenizer, facts.context)
        model = AutoModelForCausalLM.from_pretrained(facts.path, dtype=dtype)
        self._model: Any = model.to(device).eval().requires_grad_(False)
        self._hparams, self._edits = hparams, edits
        self._answerer = Answerer(model, tokenizer, facts.context)
        self._prefix = _Prefix(model, self._examples, scratch / "prefix")
        self._before = self._ask()

    def close(self) -> None:
        self._prefix.close()

    def before(self) -> Figures:
        """Of the unedited model."""
        return self._figures(self._before)

    def fisher(
        self, locations: Sequence[Location], told: Callable[[int], None]
    ) -> dict[Location, float]:
        """The diagonal Fisher score of each; `told` hears which layer was done."""
        found: dict[Location, float] = {}
        for layer in sorted({location.layer for location in locations}):
            of = fisher.scores(self._model, layer, self._examples, self._prefix.at(layer))
            for location in locations:
                if location.layer == layer:
                    found[location] = sum(of[name] for name in select(of, location.parameters))
            told(layer)
        return found

    def outcomes(self, trials: Sequence[Trial], watch: Watch) -> Iterator[Outcome]:
        """Of each trial, by layer."""
        for trial in sorted(trials, key=lambda trial: trial.location.layer):
            yield self._try(trial, watch)

    def _try(self, trial: Trial, watch: Watch) -> Outcome:
        """A run that does not hold is an outcome too: some locations cannot take some rates."""
        began, state, trained = time.monotonic(), State(), None
        kept = _values(self._model, trial.location)

        def see(now: State) -> None:
            nonlocal state
            state = now
            watch(trial, now)

        try:
            self._train(trial, see)
            trained = time.monotonic()
            figures, error = self._figures(self._ask()), None
        except TrainingFailed as failure:
            figures, error = Figures(), failure.detail
        finally:
            _restore(self._model, kept)
        now = time.monotonic()
        return Outcome(
            trial=trial,
            figures=figures,
            epochs=state.epoch,
            loss=None if error else state.loss,
            seconds_train=(trained or now) - began,
            seconds_evaluate=now - (trained or now),
            error=error,
        )

    def _train(self, trial: Trial, see: Callable[[State], None]) -> None:
        depth = trial.location.layer
        hparams = self._hparams.model_copy(
            update={
                "parameters": trial.location.parameters,
                "learning_rate": trial.learning_rate,
            }
        )
        stepper = LocalStepper(self._model, hparams, depth, self._prefix.at(depth))
        train(self._examples, hparams, stepper, see)

    def _figures(self, answers: Mapping[str, str]) -> Figures:
        verdicts = evaluation.judge(self._edits, answers, self._before)
        return Figures.model_validate(evaluation.aggregate(verdicts))

    def _ask(self) -> dict[str, str]:
        """Every prompt of the sample, each once."""
        stops: dict[str, tuple[str, ...]] = {}
        for edit in self._edits:
            stop = evaluation.stop_of(edit)
            for prompt in evaluation.prompts_of(edit):
                stops[prompt] = min(stops.get(prompt, stop), stop, key=len)
        answers: dict[str, str] = {}
        for stop in set(stops.values()):
            alike = [prompt for prompt, its in stops.items() if its == stop]
            answers |= self._answerer.answers(alike, stop)
        return answers


class _Prefix:
    """The frozen prefix at one depth after the other."""

    def __init__(self, model: Any, examples: Sequence[Example], file: Path) -> None:
        self._model, self._examples = model, examples
        width, dtype = model.config.hidden_size, model.dtype
        self._new = partial(HiddenStates, examples, width, dtype, CACHE_BUDGET_BYTES, file)
        self._states: HiddenStates | None = None
        self._reached: int | None = None

    def at(self, depth: int) -> HiddenStates:
        """The output of the first `depth` layers; going down, it is computed anew."""
        if self._states is None:
            self._states = self._new()
        if self._reached is not None and self._reached > depth:
            self._reached = None
        if self._reached != depth:
            frozen_prefix.run(
                self._model.get_decoder(),
                depth,
                self._examples,
                self._states,
                device=self._model.device,
                reached=self._reached,
            )
            self._reached = depth
        return self._states

    def close(self) -> None:
        if self._states is not None:
            self._states.close()
        self._states = self._reached = None


def _values(model: nn.Module, location: Location) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    tuned = select(parameters, location.parameters)
    return {name: parameters[name].detach().clone() for name in tuned}


@torch.no_grad()
def _restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)
