"""How often a running job says where it stands. Knows the loop's states, not who listens."""

import time

from workers.contract import Hparams, Progress, ProgressSink
from workers.errors import TrainingFailed
from workers.locft import State

PERIOD_S = 0.5


class Reporter:
    """Turns states into progress: at each epoch's end, and every `PERIOD_S` within.

    Raises `TrainingFailed` for an exception of the sink.
    """

    def __init__(self, hparams: Hparams, samples: int, resumed: State, sink: ProgressSink) -> None:
        self._sink = sink
        self._epochs = hparams.max_epochs
        self._samples = samples
        self._before = self._done(resumed)
        self._began = time.monotonic()
        self._last = self._began

    def __call__(self, state: State) -> None:
        now = time.monotonic()
        if not state.epoch_ended and now - self._last < PERIOD_S:
            return
        self._last = now
        done, elapsed = self._done(state), now - self._began
        rate = elapsed / max(done - self._before, 1)
        self._tell(
            Progress(
                epoch=state.epoch,
                max_epochs=self._epochs,
                step=state.steps,
                loss=state.loss,
                edits_done=state.samples,
                edits_total=state.total,
                seconds_elapsed=elapsed,
                seconds_left=rate * (self._epochs * self._samples - done),
            )
        )

    def _tell(self, progress: Progress) -> None:
        """What listens ends the run by an exception: it is not one to start again."""
        try:
            self._sink(progress)
        except Exception as error:
            message = f"progress could not be told: {type(error).__name__}: {error}"
            raise TrainingFailed(message) from error

    def _done(self, state: State) -> int:
        return (state.epoch - 1) * self._samples + state.samples


def ignore(state: State) -> None:
    """For ranks that report nothing."""
