"""The version store: safetensors shards and a manifest, written once and verified on every read.

    <store>/versions/<id>/<parameter>.<rank>-of-<ranks>.<attempt>.safetensors    a flat slice
    <store>/versions/<id>/manifest.json                                          put there last

The store is any fsspec URL. No manifest means no version, and what it names is never written again:
of several attempts at a version, one that its job was taken from among them, the first to finish
makes it. Knows nothing of models or processes; a slice is of the parameter's row-major elements.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from workers import slices
from workers.contract import DType, Hparams, Record, TrainResult
from workers.errors import ArtifactError, BaseMismatch, DigestMismatch, ManifestMissing
from workers.folders import Folder
from workers.slices import Shard, Slice, Writer

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"
_READERS = min(4, os.cpu_count() or 1)
"""Threads that read and hash shards of a tensor; hashing takes longer than reading."""


class TensorEntry(Record):
    """One edited parameter: its shards in order, and the digest of all its row-major bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    sha256: str
    shards: tuple[Shard, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """In memory."""
        return self.elements * slices.DTYPES[self.dtype].itemsize


class Lineage(Record):
    """Where a version comes from."""

    version_id: str
    parent_id: str | None
    job_id: str
    base_fingerprint: str
    hparams: Hparams
    edits: tuple[str, ...]
    """Ids of the edits trained in this version; those of its parents are in theirs."""
    training: TrainResult
    created_at: datetime


class Manifest(Lineage):
    """All that is known of a version; its tensors replace the base model's of the same names."""

    format: Literal[1] = FORMAT
    tensors: tuple[TensorEntry, ...]

    @property
    def digest(self) -> str:
        """sha256 over the tensors' digests, in the order of their names: what a loader proves."""
        return digest_of({entry.name: entry.sha256 for entry in self.tensors})

    @property
    def bytes(self) -> int:
        """Of all its tensors in memory."""
        return sum(entry.bytes for entry in self.tensors)


def digest_of(tensor_digests: dict[str, str]) -> str:
    """The version digest, from each tensor's sha256 by name."""
    lines = (f"{name} {sha256}\n" for name, sha256 in sorted(tensor_digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's row-major bytes."""
    return hashlib.sha256(slices.raw(tensor)).hexdigest()


def write_slice(
    store: str,
    version_id: str,
    name: str,
    shape: Sequence[int],
    start: int,
    flat: Tensor,
    writer: Writer,
) -> Slice:
    """Writes a rank's flat slice of a parameter, beginning at element `start`, durably."""
    folder = _writable(store, version_id)
    return slices.write_slice(folder, name, shape, start, flat, writer)


def write_manifest(store: str, lineage: Lineage, pieces: Sequence[Slice]) -> Manifest:
    """Reads all slices back, verifies that they are whole, and makes the version exist.

    What other attempts left is removed. Raises `ArtifactError` if the slices of a tensor leave a
    gap or overlap, or if the version was finished by another attempt.
    """
    folder = _writable(store, lineage.version_id)
    names = sorted({piece.name for piece in pieces})
    entries = tuple(
        _entry(folder, [piece for piece in pieces if piece.name == name]) for name in names
    )
    manifest = Manifest(**dict(lineage), tensors=entries)
    try:
        folder.write_last(MANIFEST, manifest.model_dump_json(indent=2).encode())
    except FileExistsError as error:
        raise _finished(folder) from error
    named = {MANIFEST, *(shard.file for entry in entries for shard in entry.shards)}
    for file in folder.files():
        if file not in named:
            folder.remove_file(file)
    return manifest


def exists(store: str, version_id: str) -> bool:
    """Whether the version was finished."""
    return _folder(store, version_id).has(MANIFEST)


def read_manifest(store: str, version_id: str, base_fingerprint: str | None = None) -> Manifest:
    """A version's manifest, and that it is of this base model where one is given.

    Raises `ManifestMissing`, `BaseMismatch`, or `ArtifactError` if it cannot be understood.
    """
    folder = _folder(store, version_id)
    path = f"{folder}/{MANIFEST}"
    try:
        payload = folder.read(MANIFEST)
    except FileNotFoundError as error:
        raise ManifestMissing(f"version {version_id}: no {path}, so no such version") from error
    return parse_manifest(payload, path, version_id, base_fingerprint)


def parse_manifest(
    payload: bytes, path: str, version_id: str, base_fingerprint: str | None = None
) -> Manifest:
    """A manifest from its file's bytes; `path` names the file in errors; raises as above."""
    try:
        manifest = Manifest.model_validate_json(payload)
    except ValidationError as error:
        raise ArtifactError(f"{path} is not a manifest of format {FORMAT}: {error}") from error
    if manifest.version_id != version_id:
        raise ArtifactError(f"{path} is the manifest of version {manifest.version_id}")
    if base_fingerprint is not None and manifest.base_fingerprint != base_fingerprint:
        raise BaseMismatch(
            f"version {version_id} was made from the base model {manifest.base_fingerprint}, "
            f"this one is {base_fingerprint}"
        )
    return manifest


def read_tensor(store: str, version_id: str, entry: TensorEntry) -> Tensor:
    """One parameter, whole, on the CPU: its shards and all of it verified.

    Shards are read and hashed on several threads, straight into their places; the whole is hashed
    behind them.
    """
    folder = _folder(store, version_id)
    slices.check_whole(entry.name, entry.shards, entry.elements)
    flat, digest = torch.empty(entry.elements, dtype=slices.DTYPES[entry.dtype]), hashlib.sha256()
    with ThreadPoolExecutor(_READERS, "read-shard") as readers:
        places = [flat[shard.start : shard.end] for shard in entry.shards]
        reads = [
            readers.submit(slices.read_shard_into, folder, entry.name, shard, place)
            for shard, place in zip(entry.shards, places, strict=True)
        ]
        for read, place in zip(reads, places, strict=True):
            read.result()
            digest.update(slices.raw(place))
    if digest.hexdigest() != entry.sha256:
        raise DigestMismatch(f"{folder}: tensor {entry.name}", entry.sha256, digest.hexdigest())
    return flat.view(entry.shape)


def read_slice(store: str, manifest: Manifest, name: str, start: int, end: int) -> Tensor:
    """Elements `[start, end)` of a parameter, flat; only their shards are read, and verified."""
    entry = next((entry for entry in manifest.tensors if entry.name == name), None)
    if entry is None:
        raise ArtifactError(f"version {manifest.version_id} holds no parameter {name}")
    return slices.read_range(_folder(store, manifest.version_id), name, entry.shards, start, end)


def _entry(folder: Folder, pieces: Sequence[Slice]) -> TensorEntry:
    ordered = slices.ordered(pieces)
    first, digest = ordered[0], hashlib.sha256()
    for piece in ordered:
        digest.update(slices.raw(slices.read_shard(folder, first.name, piece.shard)))
    return TensorEntry(
        name=first.name,
        shape=first.shape,
        dtype=first.dtype,
        sha256=digest.hexdigest(),
        shards=tuple(piece.shard for piece in ordered),
    )


def _folder(store: str, version_id: str) -> Folder:
    return Folder(store, "versions", version_id)


def _writable(store: str, version_id: str) -> Folder:
    folder = _folder(store, version_id)
    if folder.has(MANIFEST):
        raise _finished(folder)
    return folder


def _finished(folder: Folder) -> ArtifactError:
    return ArtifactError(f"{folder} is a finished version and cannot be written again")
