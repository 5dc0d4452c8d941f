"""A training job: the Ray Train driver, and what each of its workers does.

Knows no service and no database: a `TrainRequest` comes in, a version is in the store when `train`
returns. Everything it needs to be resumed is there.
"""

import logging
import os
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ray
import torch
import torch.distributed as dist
from ray import train as ray_train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from workers import artifact, examples, locft, models, zero3
from workers.contract import ProgressSink, TrainRequest, TrainResult
from workers.errors import (
    ArtifactError,
    BaseMismatch,
    ManifestMissing,
    TrainingFailed,
    WorkersError,
)
from workers.progress import Reporter, ignore

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 10
"""Of a minute each (Ray Train's default), until workers that find no room are given up."""


def train(request: TrainRequest, progress: ProgressSink | None = None) -> TrainResult:
    """Trains the edits into a new version and writes it; the manifest is the last thing written.

    Blocks. A version that this job has already written is not trained again. An exception from
    `progress` ends the run, so it can be cancelled there. Raises a `WorkersError`: the worker's
    own, or `TrainingFailed` with its message, or `ArtifactError` if the version id belongs to
    another job.
    """
    finished = _finished(request)
    if finished is not None:
        return finished
    began = time.monotonic()
    artifact.prepare(request.version_store, request.version_id)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"request": request, "progress": progress},
        torch_config=TorchConfig(),
        scaling_config=ScalingConfig(num_workers=request.workers, use_gpu=_gpus_for(request)),
        run_config=RunConfig(
            name=request.job_id,
            storage_path=str(Path(request.scratch_dir).resolve()),
            failure_config=FailureConfig(controller_failure_limit=_START_ATTEMPTS),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    try:
        trainer.fit()
    except ray_train.TrainingFailedError as error:
        _reraise(error)
    result = artifact.read_manifest(request.version_store, request.version_id).training
    total = time.monotonic() - began
    return result.model_copy(update={"seconds": {**result.seconds, "total": total}})


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


def _reraise(error: Exception) -> NoReturn:
    """Raises what went wrong, out of Ray Train's report of every rank.

    When one rank fails the others lose their connection to it, so an error that is ours wins.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes = [failures[rank] for rank in sorted(failures)]
    for cause in causes:
        if isinstance(cause, WorkersError):
            raise cause from None
    first = causes[0] if causes else getattr(error, "controller_failure", error)
    [line, *_] = str(first).strip().splitlines() or ["no message"]
    raise TrainingFailed(f"{type(first).__name__}: {line}") from error


def _work(settings: dict[str, Any]) -> None:
    """One rank of the worker group."""
    request: TrainRequest = settings["request"]
    _set_up_process()
    clock = _Clock()
    model, samples = _load(request)
    clock.lap("load")
    sink: ProgressSink | None = settings["progress"]
    watch = Reporter(request, sink) if sink is not None and dist.get_rank() == 0 else ignore
    stepper = zero3.Zero3Stepper(model, request.hparams)
    outcome = locft.train(samples, request.hparams, stepper, watch)
    clock.lap("train")
    slices = _write_slices(request, model)
    clock.lap("write")
    if dist.get_rank() == 0:
        artifact.write_manifest(
            request.version_store, _lineage(request, outcome, clock.seconds), slices
        )
    ray_train.report({"epochs": len(outcome.epoch_losses), "loss": outcome.epoch_losses[-1]})


def _set_up_process() -> None:
    """Shares the node's cores among its ranks; Ray and DeepSpeed say only what matters."""
    here = ray_train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger().setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _load(request: TrainRequest) -> tuple[Any, list[examples.Example]]:
    from transformers import AutoTokenizer

    facts = models.check(models.resolve(request.model))
    if dist.get_rank() == 0:
        _verify_base(request, facts.path)
    tokenizer = AutoTokenizer.from_pretrained(facts.path)
    samples = examples.tokenize(request.edits, tokenizer, facts.context)
    model = zero3.load(facts, request.hparams)
    if request.parent_id is not None:
        _start_from(request, request.parent_id, model)
    return model, samples


def _verify_base(request: TrainRequest, path: Path) -> None:
    found = models.fingerprint(path)
    if found != request.base_fingerprint:
        raise BaseMismatch(
            f"the job is for the base model {request.base_fingerprint}, {request.model} is {found}"
        )


def _start_from(request: TrainRequest, parent_id: str, model: Any) -> None:
    manifest = artifact.read_manifest(request.version_store, parent_id, request.base_fingerprint)
    read_slice = partial(artifact.read_slice, request.version_store, manifest)
    zero3.overwrite(model, [entry.name for entry in manifest.tensors], read_slice)


def _write_slices(request: TrainRequest, model: Any) -> list[artifact.Slice]:
    """Each rank writes its own; returns those of all ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = [
        artifact.write_slice(
            request.version_store,
            request.version_id,
            piece.name,
            piece.shape,
            piece.start,
            piece.flat,
            rank,
            ranks,
        )
        for piece in zero3.tuned_slices(model)
    ]
    everyones: list[Sequence[artifact.Slice]] = [()] * ranks
    dist.all_gather_object(everyones, mine)
    return [piece for pieces in everyones for piece in pieces]


def _lineage(
    request: TrainRequest, outcome: locft.Outcome, seconds: dict[str, float]
) -> artifact.Lineage:
    return artifact.Lineage(
        version_id=request.version_id,
        parent_id=request.parent_id,
        job_id=request.job_id,
        base_fingerprint=request.base_fingerprint,
        hparams=request.hparams,
        edits=tuple(edit.id for edit in request.edits),
        training=TrainResult(
            version_id=request.version_id,
            epochs=len(outcome.epoch_losses),
            steps=outcome.steps,
            epoch_losses=outcome.epoch_losses,
            seconds={**seconds, "total": sum(seconds.values())},
        ),
        created_at=datetime.now(UTC),
    )


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = now - self._began
        self._began = now
