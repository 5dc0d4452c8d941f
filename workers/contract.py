"""What crosses the boundary between the service and a training job: frozen, torch-free records.

Both sides import this module; it imports neither of them.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

DType = Literal["float32", "bfloat16"]
Offload = Literal["none", "cpu", "nvme"]
Device = Literal["auto", "cuda", "cpu"]
Format = Literal["raw", "qa", "chat", "prefix"]
"""How a prompt is put to the model: as is, as a question, as a chat turn, after unrelated text."""


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


class Anchor(Record):
    """A prompt and the answer that it is to keep; trained along with the edits."""

    prompt: str
    answer: str


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
    formats: tuple[Format, ...] | None = Field(default=None, min_length=1)
    """In which each edit is trained and evaluated; None: all that the tokenizer supports.
    The paper's is `("raw",)`."""
    sit_out_epochs: int = Field(default=0, ge=0, le=1_000)
    """How many epochs a sample may sit out once its loss is under the threshold; all are checked
    again before the end. The paper's is 0."""
    rehearsal: int = Field(default=100, ge=0, le=1_000_000)
    """How many earlier edits an `extend` trains along."""
    anchor_locality: bool = False
    """Whether the edits' locality prompts are trained along at their present answers."""
    anchor_prompts: int = Field(default=0, ge=0, le=1_000_000)
    """How many prompts of the service's anchors file are trained along at their present answers."""


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
    """Those of this job."""
    rehearsed: tuple[EditRecord, ...] = ()
    """Earlier edits, trained along in every format so that they stay."""
    anchors: tuple[Anchor, ...] = ()
    """Unrelated answers, trained along as they are so that they stay."""
    workers: int = Field(ge=1)
    """How many ranks, at most."""
    min_workers: int | None = Field(default=None, ge=1)
    """Elastic: the run starts, or goes on, with as few as these; None: only with `workers`."""
    device: Device = "auto"
    """What a rank computes on; `auto`: a GPU each if the Ray cluster has as many, else CPUs."""
    offload: Offload = "none"
    """Where frozen weights are kept between uses."""
    cache_budget_bytes: int = Field(default=8 << 30, ge=0)
    """Host memory per rank for the frozen prefix's hidden states; beyond it they are in files."""
    checkpoint_every_s: float = Field(default=30.0, ge=0)
    """At least so long between two checkpoints of the run."""
    scratch_dir: str
    """Directory for the run's own files (Ray Train storage, the cache's files)."""


class Progress(Record):
    """Where a training job stands."""

    epoch: int
    max_epochs: int
    step: int
    loss: float
    """Mean loss so far in this epoch (per-sample cross-entropy, nats per token)."""
    edits_done: int
    """Samples seen in this epoch: an edit in one format is one sample."""
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
    """By stage: `load`, `prefix`, `train`, `write`, and `total` (with worker start-up)."""
    resumed_steps: int = 0
    """Optimizer steps that were taken over from an interrupted run's checkpoint."""


class ProgressSink(Protocol):
    """Called on rank 0 a few times a second at most; pickled into the training worker."""

    def __call__(self, progress: Progress, /) -> None: ...
