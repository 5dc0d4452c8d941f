"""The version store: safetensors shards and a manifest, written once and verified on every read.

    <store>/versions/<id>/<parameter>.<rank>-of-<ranks>.safetensors    a flat slice [start, end)
    <store>/versions/<id>/manifest.json                                renamed into place last

The store is any fsspec URL. No manifest means no version. Knows nothing of models or processes;
a slice is of the parameter's row-major elements.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Literal

import fsspec
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from workers.contract import DType, Hparams, Record, TrainResult
from workers.errors import (
    ArtifactError,
    BaseMismatch,
    DigestMismatch,
    ManifestMissing,
    ShardMissing,
)

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_DTYPES: dict[torch.dtype, DType] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Shard(Record):
    """One file: elements `[start, end)` of its tensor, and the digest of the file's bytes."""

    file: str
    start: int
    end: int
    sha256: str
    bytes: int


class Slice(Record):
    """What one rank wrote of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    shard: Shard


class TensorEntry(Record):
    """One edited parameter: its shards in order, and the digest of all its row-major bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    sha256: str
    shards: tuple[Shard, ...]


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


def digest_of(tensor_digests: dict[str, str]) -> str:
    """The version digest, from each tensor's sha256 by name."""
    lines = (f"{name} {sha256}\n" for name, sha256 in sorted(tensor_digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's row-major bytes."""
    return hashlib.sha256(_raw(tensor)).hexdigest()


def prepare(store: str, version_id: str) -> None:
    """Removes what an unfinished run left of a version; refuses the id of a finished one."""
    fs, folder = _folder(store, version_id)
    _refuse_finished(fs, folder)
    if fs.exists(folder):
        fs.rm(folder, recursive=True)
    fs.makedirs(folder, exist_ok=True)


def write_slice(
    store: str,
    version_id: str,
    name: str,
    shape: Sequence[int],
    start: int,
    flat: Tensor,
    rank: int,
    ranks: int,
) -> Slice:
    """Writes a rank's flat slice of a parameter, beginning at element `start`, durably."""
    if flat.dtype not in _DTYPES:
        raise ArtifactError(
            f"{name}: dtype {flat.dtype} cannot be published; use float32 or bfloat16"
        )
    fs, folder = _folder(store, version_id)
    _refuse_finished(fs, folder)
    file = f"{name}.{rank:05d}-of-{ranks:05d}.safetensors"
    payload = safetensors.torch.save({name: flat.detach().cpu().contiguous()})
    fs.makedirs(folder, exist_ok=True)
    _write(fs, f"{folder}/{file}", payload)
    shard = Shard(
        file=file,
        start=start,
        end=start + flat.numel(),
        sha256=hashlib.sha256(payload).hexdigest(),
        bytes=len(payload),
    )
    return Slice(name=name, shape=tuple(shape), dtype=_DTYPES[flat.dtype], shard=shard)


def write_manifest(store: str, lineage: Lineage, slices: Sequence[Slice]) -> Manifest:
    """Reads all slices back, verifies that they are whole, and makes the version exist.

    Raises `ArtifactError` if the slices of a tensor leave a gap or overlap.
    """
    fs, folder = _folder(store, lineage.version_id)
    _refuse_finished(fs, folder)
    names = sorted({piece.name for piece in slices})
    entries = tuple(
        _entry(fs, folder, [piece for piece in slices if piece.name == name]) for name in names
    )
    manifest = Manifest(**dict(lineage), tensors=entries)
    unfinished = f"{folder}/.{MANIFEST}.partial"
    _write(fs, unfinished, manifest.model_dump_json(indent=2).encode())
    fs.mv(unfinished, f"{folder}/{MANIFEST}")
    _sync_folder(fs, folder)
    return manifest


def exists(store: str, version_id: str) -> bool:
    """Whether the version was finished."""
    fs, folder = _folder(store, version_id)
    return bool(fs.exists(f"{folder}/{MANIFEST}"))


def read_manifest(store: str, version_id: str, base_fingerprint: str | None = None) -> Manifest:
    """A version's manifest, and that it is of this base model where one is given.

    Raises `ManifestMissing`, `BaseMismatch`, or `ArtifactError` if it cannot be understood.
    """
    fs, folder = _folder(store, version_id)
    path = f"{folder}/{MANIFEST}"
    try:
        manifest = Manifest.model_validate_json(fs.cat_file(path))
    except FileNotFoundError as error:
        raise ManifestMissing(f"version {version_id}: no {path}, so no such version") from error
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


def read_tensors(store: str, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Every edited parameter, whole, on the CPU; each is verified before it is given out."""
    fs, folder = _folder(store, manifest.version_id)
    for entry in manifest.tensors:
        flat = torch.cat([_load(fs, folder, entry.name, shard) for shard in entry.shards])
        found = tensor_digest(flat)
        if found != entry.sha256:
            raise DigestMismatch(f"{folder}: tensor {entry.name}", entry.sha256, found)
        yield entry.name, flat.view(entry.shape)


def read_slice(store: str, manifest: Manifest, name: str, start: int, end: int) -> Tensor:
    """Elements `[start, end)` of a parameter, flat; only their shards are read, and verified."""
    fs, folder = _folder(store, manifest.version_id)
    entry = next((entry for entry in manifest.tensors if entry.name == name), None)
    if entry is None:
        raise ArtifactError(f"version {manifest.version_id} holds no parameter {name}")
    if not 0 <= start <= end <= entry.shards[-1].end:
        raise ArtifactError(f"{name}: no elements [{start}, {end}) in {entry.shards[-1].end}")
    pieces = [
        _load(fs, folder, name, shard)[max(start - shard.start, 0) : end - shard.start]
        for shard in entry.shards
        if shard.start < end and start < shard.end
    ]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=getattr(torch, entry.dtype))


def _entry(fs: Any, folder: str, slices: Sequence[Slice]) -> TensorEntry:
    ordered = sorted(slices, key=lambda piece: piece.shard.start)
    first = ordered[0]
    reached, digest = 0, hashlib.sha256()
    for piece in ordered:
        if (piece.shape, piece.dtype) != (first.shape, first.dtype):
            raise ArtifactError(f"{first.name}: its slices differ in shape or dtype")
        if piece.shard.start != reached:
            raise ArtifactError(
                f"{first.name}: the next slice begins at {piece.shard.start}, not at {reached}"
            )
        digest.update(_raw(_load(fs, folder, first.name, piece.shard)))
        reached = piece.shard.end
    if reached != torch.Size(first.shape).numel():
        raise ArtifactError(f"{first.name}: slices end at {reached}, the shape is {first.shape}")
    return TensorEntry(
        name=first.name,
        shape=first.shape,
        dtype=first.dtype,
        sha256=digest.hexdigest(),
        shards=tuple(piece.shard for piece in ordered),
    )


def _load(fs: Any, folder: str, name: str, shard: Shard) -> Tensor:
    path = f"{folder}/{shard.file}"
    try:
        payload: bytes = fs.cat_file(path)
    except FileNotFoundError as error:
        raise ShardMissing(f"{path} is named by the manifest and not there") from error
    found = hashlib.sha256(payload).hexdigest()
    if found != shard.sha256:
        raise DigestMismatch(path, shard.sha256, found)
    flat: Tensor = safetensors.torch.load(payload)[name]
    if flat.shape != (shard.end - shard.start,):
        raise ArtifactError(f"{path}: {tuple(flat.shape)} elements, not {shard.end - shard.start}")
    return flat


def _raw(tensor: Tensor) -> Any:
    """The row-major bytes as a buffer; numpy has no bfloat16, so viewed as bytes first."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _folder(store: str, version_id: str) -> tuple[Any, str]:
    if not _PLAIN_NAME.fullmatch(version_id):
        raise ArtifactError(f"version id {version_id!r} is not a plain name")
    fs, root = fsspec.core.url_to_fs(store)
    return fs, f"{root.rstrip('/')}/versions/{version_id}"


def _refuse_finished(fs: Any, folder: str) -> None:
    if fs.exists(f"{folder}/{MANIFEST}"):
        raise ArtifactError(f"{folder} is a finished version and cannot be written again")


def _write(fs: Any, path: str, payload: bytes) -> None:
    with fs.open(path, "wb") as stream:
        stream.write(payload)
        if "file" in fs.protocol:
            stream.flush()
            os.fsync(stream.fileno())


def _sync_folder(fs: Any, folder: str) -> None:
    """A rename is durable only once its folder is."""
    if "file" not in fs.protocol:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
