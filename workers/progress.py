"""How often a running job says where it stands. Knows the loop's positions, not who listens."""

import time

from workers.contract import Progress, ProgressSink, TrainRequest
from workers.locft import Position

PERIOD_S = 0.5


class Reporter:
    """Turns positions into progress: at each epoch's end, and every `PERIOD_S` within."""

    def __init__(self, request: TrainRequest, sink: ProgressSink) -> None:
        self._sink = sink
        self._epochs = request.hparams.max_epochs
        self._edits = len(request.edits)
        self._began = time.monotonic()
        self._last = self._began

    def __call__(self, position: Position) -> None:
        now = time.monotonic()
        if not position.epoch_ended and now - self._last < PERIOD_S:
            return
        self._last = now
        done = (position.epoch - 1) * self._edits + position.samples
        elapsed = now - self._began
        self._sink(
            Progress(
                epoch=position.epoch,
                max_epochs=self._epochs,
                step=position.step,
                loss=position.loss,
                edits_done=position.samples,
                edits_total=self._edits,
                seconds_elapsed=elapsed,
                seconds_left=elapsed * (self._epochs * self._edits - done) / done,
            )
        )


def ignore(position: Position) -> None:
    """For ranks that report nothing."""
