"""A training job: the Ray Train driver, and its starting again when workers die.

Knows no service and no database: a `TrainRequest` comes in, a version is in the store when `train`
returns. Everything it needs to be resumed is there.
"""

import logging
import os
import shutil
import time
from typing import Any, NoReturn
from uuid import uuid4

import ray
import torch.distributed as dist
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import train as ray_train
from ray.exceptions import RayActorError, RayTaskError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from workers import artifact, checkpoint, run
from workers.contract import ProgressSink, TrainRequest, TrainResult
from workers.errors import (
    ArtifactError,
    ManifestMissing,
    TrainingFailed,
    WorkersError,
)
from workers.folders import Folder

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
        _discard_attempts(request)
        return finished
    began = time.monotonic()
    # An attempt that the job was taken from leaves those of the one after alone.
    runs = Folder(request.version_store, "runs", request.job_id, uuid4().hex[:12])
    try:
        _run_to_its_end(request, progress, runs)
    finally:
        shutil.rmtree(run.scratch_of(request), ignore_errors=True)
        runs.remove()
    result = artifact.read_manifest(request.version_store, request.version_id).training
    _discard_attempts(request)
    total = time.monotonic() - began
    return result.model_copy(update={"seconds": {**result.seconds, "total": total}})


def _discard_attempts(request: TrainRequest) -> None:
    checkpoint.discard(request.version_store, request.job_id)
    Folder(request.version_store, "runs", request.job_id).remove()


def _run_to_its_end(request: TrainRequest, progress: ProgressSink | None, runs: Folder) -> None:
    """Runs the worker group, again if it or its controller died before the version was there."""
    for restarts_left in reversed(range(_RESTARTS + 1)):
        _free_reservations()
        try:
            _trainer(request, progress, runs).fit()
            return
        except (ray_train.TrainingFailedError, RayActorError) as error:
            if artifact.exists(request.version_store, request.version_id):
                return
            cause = _cause(error)
            if restarts_left == 0 or not _died(cause):
                _reraise(cause)
            logger.warning("job %s: its workers died (%s); going on", request.job_id, cause)


def _free_reservations() -> None:
    """Gives back what an earlier run of this Ray job still holds; one trains at a time.

    Ray Train cleans up after a controller that died, but not if it died while its workers were
    being started. Serve's own reservations have names.
    """
    mine = ray.get_runtime_context().get_job_id()
    for group in placement_group_table().values():
        held = not group["name"] and group["state"] != "REMOVED"
        if held and group["placement_group_id"].endswith(mine):
            logger.warning("freeing %s, left by a run that died", group["placement_group_id"])
            group_id = ray.PlacementGroupID(bytes.fromhex(group["placement_group_id"]))
            remove_placement_group(PlacementGroup(group_id))


def _trainer(request: TrainRequest, progress: ProgressSink | None, runs: Folder) -> TorchTrainer:
    """`runs` is where Ray Train keeps what it knows of its runs."""
    # Ranks that are taken away are started again like any that die: no process looks out for it.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    fewest = min(request.min_workers or request.workers, request.workers)
    workers = request.workers if fewest == request.workers else (fewest, request.workers)
    return TorchTrainer(
        _work,
        train_loop_config={"request": request, "progress": progress},
        torch_config=TorchConfig(),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=_gpus_for(request)),
        run_config=RunConfig(
            name=f"{request.job_id}-{uuid4().hex[:8]}",
            # Every node's workers look for it: a folder of one node is not there on the others.
            storage_path=runs.path,
            storage_filesystem=PyFileSystem(FSSpecHandler(runs.fs)),
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
    """Whether each worker has one; Ray Train waits for those that are to be."""
    if request.device != "auto":
        return request.device == "cuda"
    gpus = ray.cluster_resources().get("GPU", 0)
    if 0 < gpus < request.workers:
        logger.warning(
            "%d training workers and only %d GPUs: training on CPUs; to wait for GPUs set "
            "ERRATA_TRAIN_DEVICE=cuda",
            request.workers,
            gpus,
        )
    return bool(gpus >= request.workers)


def _cause(error: Exception) -> Exception:
    """What went wrong, out of Ray Train's report of every rank.

    When one rank fails the others lose their connection to it, so an error that is ours wins.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes = [_unwrapped(failures[rank]) for rank in sorted(failures)]
    ours = [cause for cause in causes if isinstance(cause, WorkersError)]
    return next(iter(ours or causes), _unwrapped(getattr(error, "controller_failure", error)))


def _unwrapped(error: Exception) -> Exception:
    """What was raised in a worker, of the type it had there."""
    return error.cause if isinstance(error, RayTaskError) else error


def _died(cause: Exception) -> bool:
    """Whether a worker or the controller was lost, or the others noticed so first."""
    lost = type(cause).__module__.startswith("ray.") or isinstance(cause, dist.DistError)
    return lost or any(name in str(cause) for name in ("gloo", "NCCL"))


def _reraise(cause: Exception) -> NoReturn:
    if isinstance(cause, WorkersError):
        raise cause from None
    [line, *_] = str(cause).strip().splitlines() or ["no message"]
    raise TrainingFailed(f"{type(cause).__name__}: {line}") from cause


def _work(settings: dict[str, Any]) -> None:
    """One rank of the worker group."""
    request: TrainRequest = settings["request"]
    run.set_up_process()
    mine = run.Run(request)
    sink: ProgressSink | None = settings["progress"]
    ended = mine.train(sink if dist.get_rank() == 0 else None)
    mine.publish(ended)
    ray_train.report({"epochs": len(ended.epoch_losses), "loss": ended.epoch_losses[-1]})
