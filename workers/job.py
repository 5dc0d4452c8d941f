"""A training job: the Ray Train driver, and what each of its workers does.

Knows no service and no database: a `TrainRequest` comes in, a version is in the store when `train`
returns. Everything it needs to be resumed is there.
"""

import logging
import os
import time
import warnings
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import ray
import torch
import torch.distributed as dist
from ray import train as ray_train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from workers import artifact, checkpoint, examples, formats, frozen_prefix, locft, models, zero3
from workers.contract import ProgressSink, TrainRequest, TrainResult
from workers.errors import (
    ArtifactError,
    BaseMismatch,
    ManifestMissing,
    TrainingFailed,
    WorkersError,
)
from workers.locft import State, Watch
from workers.progress import Reporter, ignore
from workers.slices import Slice

logger = logging.getLogger(__name__)

_RESTARTS = 3
"""Of a run whose workers or controller died."""
_START_ATTEMPTS = 10
"""Of a minute each (Ray Train's default), until workers that find no room are given up."""


def train(request: TrainRequest, progress: ProgressSink | None = None) -> TrainResult:
    """Trains the edits into a new version and writes it; the manifest is the last thing written.

    Blocks. A version that this job has already written is not trained again; a run whose workers
    died is started again and goes on from its last checkpoint, as does one whose caller died and
    calls again. An exception from `progress` ends the run, so it can be cancelled there. Raises a
    `WorkersError`: the worker's own, or `TrainingFailed` with its message, or `ArtifactError` if
    the version id belongs to another job.
    """
    finished = _finished(request)
    if finished is not None:
        return finished
    began = time.monotonic()
    artifact.prepare(request.version_store, request.version_id)
    for restarts_left in reversed(range(_RESTARTS + 1)):
        try:
            _trainer(request, progress).fit()
            break
        except (ray_train.TrainingFailedError, RayActorError) as error:
            cause = _cause(error)
            if restarts_left == 0 or not _died(cause):
                _reraise(cause)
            logger.warning("job %s: its workers died (%s); going on", request.job_id, cause)
    checkpoint.discard(request.version_store, request.job_id)
    result = artifact.read_manifest(request.version_store, request.version_id).training
    total = time.monotonic() - began
    return result.model_copy(update={"seconds": {**result.seconds, "total": total}})


def _trainer(request: TrainRequest, progress: ProgressSink | None) -> TorchTrainer:
    fewest = min(request.min_workers or request.workers, request.workers)
    workers = request.workers if fewest == request.workers else (fewest, request.workers)
    return TorchTrainer(
        _work,
        train_loop_config={"request": request, "progress": progress},
        torch_config=TorchConfig(),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=_gpus_for(request)),
        run_config=RunConfig(
            name=f"{request.job_id}-{uuid4().hex[:8]}",
            storage_path=str(Path(request.scratch_dir).resolve()),
            failure_config=FailureConfig(controller_failure_limit=_START_ATTEMPTS),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _finished(request: TrainRequest) -> TrainResult | None:
    try:
        manifest = artifact.read_manifest(request.version_store, request.version_id)
    except ManifestMissing:
        return None
    if manifest.job_id != request.job_id:
        raise ArtifactError(
            f"version {request.version_id} was written by job {manifest.job_id}, "
            f"not {request.job_id}; ask for another version id"
        )
    return manifest.training


def _gpus_for(request: TrainRequest) -> bool:
    """One GPU a worker if the cluster has as many, else none."""
    gpus = ray.cluster_resources().get("GPU", 0)
    if 0 < gpus < request.workers:
        logger.warning(
            "%d training workers and only %d GPUs: training on CPUs", request.workers, gpus
        )
    return bool(gpus >= request.workers)


def _cause(error: Exception) -> Exception:
    """What went wrong, out of Ray Train's report of every rank.

    When one rank fails the others lose their connection to it, so an error that is ours wins.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes = [failures[rank] for rank in sorted(failures)]
    ours = [cause for cause in causes if isinstance(cause, WorkersError)]
    return next(iter(ours or causes), getattr(error, "controller_failure", error))


def _died(cause: Exception) -> bool:
    """Whether a worker or the controller was lost, or the others noticed so first."""
    lost = type(cause).__module__.startswith("ray.")
    return lost or any(name in str(cause) for name in ("gloo", "NCCL"))


def _reraise(cause: Exception) -> NoReturn:
    if isinstance(cause, WorkersError):
        raise cause from None
    [line, *_] = str(cause).strip().splitlines() or ["no message"]
    raise TrainingFailed(f"{type(cause).__name__}: {line}") from cause


def _work(settings: dict[str, Any]) -> None:
    """One rank of the worker group."""
    request: TrainRequest = settings["request"]
    _set_up_process()
    run = _Run(request)
    sink: ProgressSink | None = settings["progress"]
    ended = run.train(sink if dist.get_rank() == 0 else None)
    run.publish(ended)
    ray_train.report({"epochs": len(ended.epoch_losses), "loss": ended.epoch_losses[-1]})


def _set_up_process() -> None:
    """Shares the node's cores among its ranks; Ray and DeepSpeed say only what matters."""
    here = ray_train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    # Adam's squares of vanishing gradients slow a CPU down threefold.
    torch.set_flush_denormal(True)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger().setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


class _Run:
    """A rank's part of a job: load, run the prefix, train, publish."""

    def __init__(self, request: TrainRequest) -> None:
        self._request, self._hparams = request, request.hparams
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._clock = _Clock()
        self._scratch = Path(request.scratch_dir).resolve() / request.job_id
        opened, self._samples = _load(request, self._scratch)
        self._opened = opened
        self._clock.lap("load")
        mine = zero3.owned(self._samples)
        self._states = frozen_prefix.HiddenStates(
            mine,
            opened.model.config.hidden_size,
            getattr(torch, self._hparams.dtype),
            request.cache_budget_bytes,
            self._scratch / f"prefix-{uuid4().hex}",
        )
        zero3.fill_prefix(opened, mine, self._states)
        self._clock.lap("prefix")

    def train(self, sink: ProgressSink | None) -> State:
        """Runs the loop to its end, from the newest checkpoint if there is one."""
        request = self._request
        suffix = self._opened.suffix()
        if request.parent_id is not None:
            _start_from(request, request.parent_id, self._opened)
        stepper = zero3.Zero3Stepper(suffix, self._opened, self._hparams, self._states)
        saved = checkpoint.newest(request.version_store, request.job_id)
        if saved is not None:
            stepper.restore(saved)
        state = saved.state if saved is not None else State()
        self._resumed_steps = state.steps
        report = ignore
        if sink is not None:
            report = Reporter(self._hparams, len(self._samples), state, sink)
        watch = _Watch(request, stepper, report)
        try:
            ended = locft.train(self._samples, self._hparams, stepper, watch, state)
        finally:
            self._states.close()
        self._clock.lap("train")
        return ended

    def publish(self, ended: State) -> None:
        """Each rank writes its slices; the first, the manifest."""
        request = self._request
        mine = [
            artifact.write_slice(
                request.version_store,
                request.version_id,
                piece.name,
                piece.shape,
                piece.start,
                piece.flat,
                self._rank,
                self._ranks,
            )
            for piece in zero3.tuned_slices(self._opened.tuned)
        ]
        everyones = _gather(mine)
        self._clock.lap("write")
        if self._rank == 0:
            artifact.write_manifest(request.version_store, self._lineage(ended), everyones)

    def _lineage(self, ended: State) -> artifact.Lineage:
        request, seconds = self._request, self._clock.seconds
        return artifact.Lineage(
            version_id=request.version_id,
            parent_id=request.parent_id,
            job_id=request.job_id,
            base_fingerprint=request.base_fingerprint,
            hparams=request.hparams,
            edits=tuple(edit.id for edit in request.edits),
            training=TrainResult(
                version_id=request.version_id,
                epochs=len(ended.epoch_losses),
                steps=ended.steps,
                epoch_losses=ended.epoch_losses,
                seconds={**seconds, "total": sum(seconds.values())},
                resumed_steps=self._resumed_steps,
            ),
            created_at=datetime.now(UTC),
        )


class _Watch:
    """Called after each mini-batch: reports it, and checkpoints when it is time on rank 0."""

    def __init__(self, request: TrainRequest, stepper: zero3.Zero3Stepper, report: Watch) -> None:
        self._request, self._stepper, self._report = request, stepper, report
        self._last = time.monotonic()

    def __call__(self, state: State) -> None:
        self._report(state)
        due = torch.tensor([time.monotonic() - self._last >= self._request.checkpoint_every_s])
        dist.broadcast(due, 0)
        if due:
            self._save(state)
            self._last = time.monotonic()

    def _save(self, state: State) -> None:
        checkpoint.save(
            self._request.version_store,
            self._request.job_id,
            state,
            self._stepper.pieces(),
            dist.get_rank(),
            dist.get_world_size(),
            _gather,
        )


def _gather(mine: list[Slice]) -> list[Slice]:
    everyones: list[list[Slice]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return [piece for pieces in everyones for piece in pieces]


def _load(
    request: TrainRequest, scratch: Path
) -> tuple[zero3.PartitionedModel, list[examples.Example]]:
    from transformers import AutoTokenizer

    facts = models.check(models.resolve(request.model))
    if dist.get_rank() == 0:
        _verify_base(request, facts.path)
    tokenizer = AutoTokenizer.from_pretrained(facts.path)
    chosen = formats.chosen(request.hparams.formats, tokenizer)
    edits = [*request.edits, *request.rehearsed]
    samples = examples.tokenize(edits, tokenizer, facts.context, chosen, request.anchors)
    return zero3.open_model(facts, request.hparams, request.offload, scratch), samples


def _verify_base(request: TrainRequest, path: Path) -> None:
    found = models.fingerprint(path)
    if found != request.base_fingerprint:
        raise BaseMismatch(
            f"the job is for the base model {request.base_fingerprint}, {request.model} is {found}"
        )


def _start_from(request: TrainRequest, parent_id: str, opened: zero3.PartitionedModel) -> None:
    manifest = artifact.read_manifest(request.version_store, parent_id, request.base_fingerprint)
    read_slice = partial(artifact.read_slice, request.version_store, manifest)
    zero3.overwrite(opened.tuned, [entry.name for entry in manifest.tensors], read_slice)


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = now - self._began
        self._began = now
