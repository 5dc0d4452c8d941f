"""What crosses the boundary between the service and a training job: frozen, torch-free records.

Both sides import this module; it imports neither of them.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

DType = Literal["float32", "bfloat16"]


class Record(BaseModel):
    """A frozen value that rejects unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LocalityProbe(Record):
    """An unrelated prompt and, if known, the answer that must stay."""

    prompt: str
    answer: str | None = None


class EditRecord(Record):
    """One edit as a job sees it."""

    id: str
    prompt: str
    target: str
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[LocalityProbe, ...] = ()


class Hparams(Record):
    """LocFT-BF hyperparameters (paper, section 4; values per model in `hparams/*.yaml`)."""

    parameters: tuple[str, ...] = Field(min_length=1)
    """Exact names of the tuned parameters, as in `model.named_parameters()`."""
    learning_rate: float = Field(gt=0, le=1)
    batch_size: int = Field(default=100, ge=1, le=100_000)
    max_epochs: int = Field(default=25, ge=1, le=1_000)
    loss_threshold: float = Field(default=0.01, ge=0)
    """A batch under it takes no step; an epoch whose mean is under it is the last."""
    seed: int = Field(default=0, ge=0)
    dtype: DType = "float32"
    """Of the frozen weights and the published tensors; the tuned tensors have a float32 master."""


class TrainRequest(Record):
    """All that a training job needs to know."""

    job_id: str
    version_id: str
    """Version to be written, as `v12`."""
    parent_id: str | None
    """Version to start from (warm start), or None to start from the base."""
    model: str
    """Directory or hub id of the base model."""
    base_fingerprint: str
    version_store: str
    """fsspec URL under which `versions/<id>/` is written."""
    hparams: Hparams
    edits: tuple[EditRecord, ...] = Field(min_length=1)
    workers: int = Field(ge=1)
    scratch_dir: str
    """Directory for the run's own files (Ray Train storage)."""


class Progress(Record):
    """Where a training job stands."""

    epoch: int
    max_epochs: int
    step: int
    loss: float
    """Mean loss so far in this epoch (per-sample cross-entropy, nats per token)."""
    edits_done: int
    """Edits seen in this epoch."""
    edits_total: int
    seconds_elapsed: float
    seconds_left: float
    """Upper estimate: the run may stop before `max_epochs`."""


class TrainResult(Record):
    """What a finished training job says of itself; the weights are in the version store."""

    version_id: str
    epochs: int
    steps: int
    epoch_losses: tuple[float, ...]
    seconds: Mapping[str, float]
    """By stage: `load`, `train`, `write`, and `total` (with worker start-up)."""


class ProgressSink(Protocol):
    """Called on rank 0 a few times a second at most; pickled into the training worker."""

    def __call__(self, progress: Progress, /) -> None: ...
