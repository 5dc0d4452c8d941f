"""Jobs: one run of claim, train, evaluate, publish and roll out. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from workers.contract import Anchor, EditRecord, Progress


class JobKind(StrEnum):
    EXTEND = "extend"
    """Start from the live version and train the queued edits, with a sample of earlier ones."""
    REBUILD = "rebuild"
    """Start from the base and train every applied and every queued edit."""


class JobState(StrEnum):
    PENDING = "pending"
    TRAINING = "training"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"
    ROLLING_OUT = "rolling_out"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Trainer(StrEnum):
    COORDINATOR = "coordinator"
    """The service's leader, on the Ray cluster that serves."""
    RUNNER = "runner"
    """`errata jobs run --here`, on the Ray cluster where that runs."""


_ENDS = frozenset({JobState.FAILED, JobState.CANCELLED})

JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.PENDING: frozenset({JobState.TRAINING}) | _ENDS,
    JobState.TRAINING: frozenset({JobState.EVALUATING}) | _ENDS,
    JobState.EVALUATING: frozenset({JobState.PUBLISHING}) | _ENDS,
    JobState.PUBLISHING: frozenset({JobState.ROLLING_OUT, JobState.DONE}) | _ENDS,
    JobState.ROLLING_OUT: frozenset({JobState.DONE, JobState.FAILED}),
    JobState.DONE: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

UNTRAINED = frozenset({JobState.PENDING, JobState.TRAINING})
FINISHED = frozenset(state for state, following in JOB_TRANSITIONS.items() if not following)


@dataclass(frozen=True)
class Job:
    id: str
    kind: JobKind
    state: JobState
    activate: bool
    """Whether its version is rolled out as soon as it is published."""
    max_edits: int | None
    edit_ids: tuple[str, ...] | None
    """Restriction to these edits, or None for all that are queued."""
    hparams: Mapping[str, Any]
    """Overrides of the model family's hyperparameters."""
    recheck: int | None
    """How many of the parent's edits are asked again of the new version, or None for all."""
    trained_by: Trainer
    trainer_id: str | None
    """Of the one process that may train it now; drawn anew by each that takes it."""
    parent_id: str | None
    version_id: str | None
    """Allocated when training starts."""
    edits: int
    """How many edits it claimed."""
    progress: Progress | None
    metrics: Mapping[str, float]
    """reliability, generalization, locality in percent, once evaluated; the first two in each
    further prompt format too, and how many of the earlier edits asked again still hold."""
    seconds: Mapping[str, float]
    """By stage."""
    error: str | None
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True)
class Retention:
    """What a job trains along with its edits, so that it stays."""

    rehearsed: tuple[EditRecord, ...] = ()
    """Of the parent's edits."""
    anchors: tuple[Anchor, ...] = ()
