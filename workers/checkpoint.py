"""A run's checkpoints: what a job needs to go on after its workers, or their nodes, have died.

    <store>/checkpoints/<job>/<epoch>-<batches>-<attempt>/
        slices of the tuned weights and Adam's moments
        checkpoint.json                                     the loop's state; put there last

In the version store, because that is what survives a node. A checkpoint is not bound to the number
of ranks that wrote it. Only the newest is kept.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from torch import Tensor

from workers import slices
from workers.contract import Record
from workers.errors import ArtifactError, TrainingFailed
from workers.folders import Folder
from workers.locft import State
from workers.slices import Shard, Slice, Writer

FILE = "checkpoint.json"
_FOLDER = re.compile(r"\d{5}-\d{7}-\w+")

Gather = Callable[[list[Slice]], list[Slice]]
"""All ranks' slices, from this rank's; a barrier."""


class Contents(Record):
    """`checkpoint.json`."""

    job_id: str
    state: State
    tensors: dict[str, tuple[Shard, ...]]


@dataclass(frozen=True)
class Piece:
    """A rank's part of a tensor: `flat` holds its elements from `start`, row-major, unpadded."""

    name: str
    shape: tuple[int, ...]
    start: int
    flat: Tensor


@dataclass(frozen=True)
class Saved:
    """A checkpoint to go on from."""

    state: State
    folder: Folder
    tensors: dict[str, tuple[Shard, ...]]

    def read(self, name: str, start: int, end: int) -> Tensor:
        """Elements `[start, end)` of a tensor, flat and verified."""
        if name not in self.tensors:
            raise ArtifactError(f"{self.folder}: no tensor {name}; the job tunes other parameters")
        return slices.read_range(self.folder, name, self.tensors[name], start, end)


class Checkpoints:
    """Those that one attempt at a job writes.

    It removes its own and those that were there when it began, which may be of an attempt that is
    no longer wanted and does not know yet: never those of one that began later.
    """

    def __init__(self, store: str, job_id: str, writer: Writer) -> None:
        self._store, self._job_id, self._writer = store, job_id, writer
        self._root = Folder(store, "checkpoints", job_id)
        self._earlier = set(self._root.folders())

    def save(self, state: State, pieces: Iterable[Piece], gather: Gather) -> None:
        """Writes a checkpoint, on all ranks together; the ones before are removed.

        Raises `TrainingFailed` if it cannot be written, or holds what is not a number; the one
        before is kept then.
        """
        name = f"{state.epoch:05d}-{state.batches:07d}-{self._writer.attempt}"
        folder = Folder(self._store, "checkpoints", self._job_id, name)
        try:
            everyones = gather([_write(folder, piece, self._writer) for piece in pieces])
            if self._writer.rank == 0:
                contents = Contents(job_id=self._job_id, state=state, tensors=_whole(everyones))
                folder.write_last(FILE, contents.model_dump_json().encode())
                self._remove_earlier()
        except OSError as error:
            folder.remove()
            raise TrainingFailed(
                f"a checkpoint cannot be written to {folder}: {error.strerror or error}; the "
                "version store needs room for three float32 copies of the tuned weights, twice"
            ) from error
        self._earlier.add(name)

    def _remove_earlier(self) -> None:
        for name in self._earlier.intersection(self._root.folders()):
            self._root.remove_folder(name)


def newest(store: str, job_id: str) -> Saved | None:
    """The newest finished checkpoint of a job."""
    root = Folder(store, "checkpoints", job_id)
    for name in sorted(filter(_FOLDER.fullmatch, root.folders()), reverse=True):
        folder = Folder(store, "checkpoints", job_id, name)
        if folder.has(FILE):
            return _read(folder)
    return None


def discard(store: str, job_id: str) -> None:
    """Removes all checkpoints of a job."""
    Folder(store, "checkpoints", job_id).remove()


def _write(folder: Folder, piece: Piece, writer: Writer) -> Slice:
    if not piece.flat.isfinite().all():
        raise TrainingFailed(
            f"{piece.name} is not finite at checkpoint {folder}; "
            "the one before is kept; a lower learning rate may help"
        )
    return slices.write_slice(folder, piece.name, piece.shape, piece.start, piece.flat, writer)


def _whole(pieces: Sequence[Slice]) -> dict[str, tuple[Shard, ...]]:
    names = sorted({piece.name for piece in pieces})
    return {
        name: tuple(p.shard for p in slices.ordered([p for p in pieces if p.name == name]))
        for name in names
    }


def _read(folder: Folder) -> Saved:
    try:
        contents = Contents.model_validate_json(folder.read(FILE))
    except ValidationError as error:
        raise ArtifactError(f"{folder}/{FILE} is not a checkpoint: {error}") from error
    return Saved(contents.state, folder, contents.tensors)
