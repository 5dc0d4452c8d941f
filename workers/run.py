"""One rank's part of a training job: load, run the prefix, train, publish.

Knows the process group that Ray Train has set up, not the driver nor how a job is started again.
"""

import logging
import os
import time
import warnings
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from ray import train as ray_train

from workers import artifact, checkpoint, examples, formats, frozen_prefix, locft, models, zero3
from workers.checkpoint import Checkpoints, Saved
from workers.contract import ProgressSink, TrainRequest, TrainResult
from workers.errors import BaseMismatch
from workers.imports import leave_out_unused
from workers.locft import State, Watch
from workers.progress import Reporter, ignore
from workers.slices import Slice, Writer

T = TypeVar("T")


def scratch_of(request: TrainRequest) -> Path:
    """Where this job's workers keep the cache's files, each on its own node."""
    return Path(request.scratch_dir).resolve() / request.job_id


def set_up_process() -> None:
    """Shares the node's cores among its ranks, which load and say only what matters."""
    leave_out_unused()
    # DeepSpeed would have it compile an optimizer that is not ours: 2.6 of a rank's 15 s of CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    here = ray_train.get_context().get_local_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    # Adam's squares of vanishing gradients slow a CPU down threefold.
    torch.set_flush_denormal(True)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger().setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


class Run:
    """A rank's part of a job: load, run the prefix, train, publish."""

    def __init__(self, request: TrainRequest) -> None:
        self._request, self._hparams = request, request.hparams
        self._writer = Writer(dist.get_rank(), dist.get_world_size(), _of_first(uuid4().hex[:12]))
        self._clock = _Clock()
        scratch = scratch_of(request)
        opened, self._samples = _load(request, scratch)
        self._opened = opened
        self._clock.lap("load")
        mine = zero3.owned(self._samples)
        self._states = frozen_prefix.HiddenStates(
            mine,
            opened.model.config.hidden_size,
            getattr(torch, self._hparams.dtype),
            request.cache_budget_bytes,
            scratch / f"prefix-{uuid4().hex}",
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
        saved = _newest(request)
        if saved is not None:
            stepper.restore(saved)
        state = saved.state if saved is not None else State()
        self._resumed_steps = state.steps
        report = ignore
        if sink is not None:
            report = Reporter(self._hparams, len(self._samples), state, sink)
        kept = Checkpoints(request.version_store, request.job_id, self._writer)
        watch = _Watch(request, stepper, report, kept)
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
                self._writer,
            )
            for piece in zero3.tuned_slices(self._opened.tuned)
        ]
        everyones = _gather(mine)
        self._clock.lap("write")
        if self._writer.rank == 0:
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

    def __init__(
        self,
        request: TrainRequest,
        stepper: zero3.Zero3Stepper,
        report: Watch,
        checkpoints: Checkpoints,
    ) -> None:
        self._request, self._stepper, self._report = request, stepper, report
        self._checkpoints = checkpoints
        self._last = time.monotonic()

    def __call__(self, state: State) -> None:
        self._report(state)
        waited = time.monotonic() - self._last >= self._request.checkpoint_every_s
        due = torch.tensor([waited], device=self._stepper.device)
        dist.broadcast(due, 0)
        if due:
            self._checkpoints.save(state, self._stepper.pieces(), _gather)
            self._last = time.monotonic()


def _of_first(value: T) -> T:
    """The first rank's value, on all of them."""
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def _newest(request: TrainRequest) -> Saved | None:
    """The checkpoint to go on from, the same on all ranks."""
    first = dist.get_rank() == 0
    return _of_first(checkpoint.newest(request.version_store, request.job_id) if first else None)


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
