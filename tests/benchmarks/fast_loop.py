"""The project's own loop in one process, timed as `plain_loop` is."""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks.plain_loop import Run
from workers import frozen_prefix, locft
from workers.contract import Hparams
from workers.examples import Example
from workers.locft import State

CACHE_BYTES = 8 << 30


def train(model: Any, samples: Sequence[Example], hparams: Hparams, depth: int) -> Run:
    """Runs the prefix of `depth` layers once, then the epochs; the model is left trained."""
    run = Run()
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        states = frozen_prefix.HiddenStates(
            samples, model.config.hidden_size, model.dtype, CACHE_BYTES, Path(folder) / "prefix"
        )
        frozen_prefix.run(model.get_decoder(), depth, samples, states, device=model.device)
        run.prefix_s = time.perf_counter() - began
        stepper = locft.LocalStepper(model, hparams, depth, states)
        ended = locft.train(samples, hparams, stepper, Clock(run))
        run.epoch_losses = list(ended.epoch_losses)
        states.close()
    return run


class Clock:
    """Batch losses and epoch seconds, out of the loop's states."""

    def __init__(self, run: Run) -> None:
        self._run, self._before = run, State()
        self._began = time.perf_counter()

    def __call__(self, state: State) -> None:
        before = self._before if self._before.epoch == state.epoch else State()
        seen = state.samples - before.samples
        self._run.losses.append((state.loss_sum - before.loss_sum) / seen)
        self._before = state
        if state.epoch_ended:
            now = time.perf_counter()
            self._run.seconds.append(now - self._began)
            self._began = now
