"""Parameters as flat slices in safetensors files: each rank writes its own, anyone reads any.

A slice is of the parameter's row-major elements, `[start, end)`. Owns the files of one folder of
an fsspec store and their digests; knows neither what a folder means nor who writes it.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from typing import Any

import fsspec
import safetensors.torch
import torch
from torch import Tensor

from workers.contract import DType, Record
from workers.errors import ArtifactError, DigestMismatch, ShardMissing

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


class Folder:
    """A folder of a store: an fsspec URL and path components, each a plain name."""

    def __init__(self, store: str, *parts: str) -> None:
        for part in parts:
            if not _PLAIN_NAME.fullmatch(part):
                raise ArtifactError(f"{part!r} is not a plain name")
        self.fs, root = fsspec.core.url_to_fs(store)
        self.path = "/".join([root.rstrip("/"), *parts])
        self._local = "file" in self.fs.protocol

    def __str__(self) -> str:
        return self.path

    def has(self, file: str) -> bool:
        return bool(self.fs.exists(f"{self.path}/{file}"))

    def make(self) -> None:
        self.fs.makedirs(self.path, exist_ok=True)

    def remove(self) -> None:
        if self.fs.exists(self.path):
            self.fs.rm(self.path, recursive=True)

    def remove_folder(self, name: str) -> None:
        self.fs.rm(f"{self.path}/{name}", recursive=True)

    def folders(self) -> list[str]:
        """Names of the folders in it, in order."""
        if not self.fs.exists(self.path):
            return []
        found = self.fs.ls(self.path, detail=True, refresh=True)
        return sorted(e["name"].rsplit("/", 1)[1] for e in found if e["type"] == "directory")

    def read(self, file: str) -> bytes:
        payload: bytes = self.fs.cat_file(f"{self.path}/{file}")
        return payload

    def write(self, file: str, payload: bytes) -> None:
        """Durably, where the file system can."""
        with self.fs.open(f"{self.path}/{file}", "wb") as stream:
            stream.write(payload)
            if self._local:
                stream.flush()
                os.fsync(stream.fileno())

    def write_last(self, file: str, payload: bytes) -> None:
        """Renamed into place, so that it is there whole or not at all."""
        unfinished = f".{file}.partial"
        self.write(unfinished, payload)
        self.fs.mv(f"{self.path}/{unfinished}", f"{self.path}/{file}")
        self._sync()

    def _sync(self) -> None:
        """A rename is durable only once its folder is."""
        if not self._local:
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_slice(
    folder: Folder,
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
    file = f"{name}.{rank:05d}-of-{ranks:05d}.safetensors"
    payload = safetensors.torch.save({name: flat.detach().cpu().contiguous()})
    folder.make()
    folder.write(file, payload)
    shard = Shard(
        file=file,
        start=start,
        end=start + flat.numel(),
        sha256=hashlib.sha256(payload).hexdigest(),
        bytes=len(payload),
    )
    return Slice(name=name, shape=tuple(shape), dtype=_DTYPES[flat.dtype], shard=shard)


def ordered(slices: Sequence[Slice]) -> tuple[Slice, ...]:
    """The slices of one parameter by their place in it.

    Raises `ArtifactError` if they leave a gap, overlap or do not agree.
    """
    found = sorted(slices, key=lambda piece: piece.shard.start)
    first, reached = found[0], 0
    for piece in found:
        if (piece.shape, piece.dtype) != (first.shape, first.dtype):
            raise ArtifactError(f"{first.name}: its slices differ in shape or dtype")
        if piece.shard.start != reached:
            raise ArtifactError(
                f"{first.name}: the next slice begins at {piece.shard.start}, not at {reached}"
            )
        reached = piece.shard.end
    if reached != torch.Size(first.shape).numel():
        raise ArtifactError(f"{first.name}: slices end at {reached}, the shape is {first.shape}")
    return tuple(found)


def read_shard(folder: Folder, name: str, shard: Shard) -> Tensor:
    """A shard's elements, flat, verified against its digest."""
    path = f"{folder}/{shard.file}"
    try:
        payload = folder.read(shard.file)
    except FileNotFoundError as error:
        raise ShardMissing(f"{path} is named by the manifest and not there") from error
    found = hashlib.sha256(payload).hexdigest()
    if found != shard.sha256:
        raise DigestMismatch(path, shard.sha256, found)
    flat: Tensor = safetensors.torch.load(payload)[name]
    if flat.shape != (shard.end - shard.start,):
        raise ArtifactError(f"{path}: {tuple(flat.shape)} elements, not {shard.end - shard.start}")
    return flat


def read_range(folder: Folder, name: str, shards: Sequence[Shard], start: int, end: int) -> Tensor:
    """Elements `[start, end)` of a parameter, flat; only their shards are read, and verified."""
    if not 0 <= start <= end <= shards[-1].end:
        raise ArtifactError(f"{name}: no elements [{start}, {end}) in {shards[-1].end}")
    pieces = [
        read_shard(folder, name, shard)[max(start - shard.start, 0) : end - shard.start]
        for shard in shards
        if shard.start < end and start < shard.end
    ]
    return torch.cat(pieces) if pieces else torch.empty(0)


def raw(tensor: Tensor) -> Any:
    """The row-major bytes as a buffer; numpy has no bfloat16, so viewed as bytes first."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
