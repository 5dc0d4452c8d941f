"""Parameters as flat slices in safetensors files: each rank writes its own, anyone reads any.

A slice is of the parameter's row-major elements, `[start, end)`. Owns the files of one folder of
an fsspec store and their digests; knows neither what a folder means nor who writes it.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from uuid import uuid4

import fsspec
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from workers.contract import DType, Record
from workers.errors import ArtifactError, DigestMismatch, ShardMissing

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STORED: dict[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16}
_LENGTH_BYTES = 8
"""A safetensors file: the length of a JSON header, little-endian; the header; the elements."""

Natural = Annotated[int, Field(ge=0)]


class Shard(Record):
    """One file: elements `[start, end)` of its tensor, and the digest of the file's bytes."""

    file: str = Field(pattern=r"^[^./][^/]*\.safetensors$")
    start: Natural
    end: Natural
    sha256: str
    bytes: Natural


class Slice(Record):
    """What one rank wrote of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    shard: Shard


@dataclass(frozen=True)
class Writer:
    """One rank of one attempt at a job; no other writes a file of the same name."""

    rank: int
    ranks: int
    attempt: str
    """Drawn at random, the same on all ranks."""

    def __str__(self) -> str:
        return f"{self.rank:05d}-of-{self.ranks:05d}.{self.attempt}"


class Folder:
    """A folder of a store: an fsspec URL and path components, each a plain name."""

    def __init__(self, store: str, *parts: str) -> None:
        for part in parts:
            check_plain(part)
        self.fs, root = fsspec.core.url_to_fs(store)
        self.path = "/".join([root.rstrip("/"), *parts])
        self._local = "file" in self.fs.protocol

    def __str__(self) -> str:
        return self.path

    def has(self, file: str) -> bool:
        return self._exists(f"{self.path}/{file}")

    def make(self) -> None:
        self.fs.makedirs(self.path, exist_ok=True)

    def remove(self) -> None:
        if self._exists(self.path):
            self.fs.rm(self.path, recursive=True)

    def files(self) -> list[str]:
        """Names of the files in it."""
        return [e["name"].rsplit("/", 1)[1] for e in self._entries() if e["type"] == "file"]

    def remove_file(self, name: str) -> None:
        self.fs.rm_file(f"{self.path}/{name}")

    def remove_folder(self, name: str) -> None:
        self.fs.rm(f"{self.path}/{name}", recursive=True)

    def folders(self) -> list[str]:
        """Names of the folders in it, in order."""
        found = self._entries()
        return sorted(e["name"].rsplit("/", 1)[1] for e in found if e["type"] == "directory")

    def read(self, file: str) -> bytes:
        payload: bytes = self.fs.cat_file(f"{self.path}/{file}")
        return payload

    def open(self, file: str) -> io.FileIO | io.BytesIO:
        """For reading from its beginning; what is not a local file is in memory then."""
        if self._local:
            return open(f"{self.path}/{file}", "rb", buffering=0)
        return io.BytesIO(self.read(file))

    def write(self, file: str, payload: bytes) -> None:
        """Durably, where the file system can."""
        with self.fs.open(f"{self.path}/{file}", "wb") as stream:
            stream.write(payload)
            if self._local:
                stream.flush()
                os.fsync(stream.fileno())

    def write_last(self, file: str, payload: bytes) -> None:
        """Whole or not at all, and once: `FileExistsError` if it is there, whoever wrote it.

        A local file is linked into place; of other stores, those that can refuse to replace one.
        """
        if not self._local:
            self.fs.pipe_file(f"{self.path}/{file}", payload, mode="create")
            return
        unfinished = f"{self.path}/.{file}.{uuid4().hex}.partial"
        self.write(unfinished.rpartition("/")[2], payload)
        try:
            os.link(unfinished, f"{self.path}/{file}")
        finally:
            os.unlink(unfinished)
        self._sync()

    def _entries(self) -> list[dict[str, Any]]:
        if not self._exists(self.path):
            return []
        found: list[dict[str, Any]] = self.fs.ls(self.path, detail=True, refresh=True)
        return found

    def _exists(self, path: str) -> bool:
        # Other processes may have written or removed it since this one last listed its folder.
        self.fs.invalidate_cache(path)
        return bool(self.fs.exists(path))

    def _sync(self) -> None:
        """A rename is durable only once its folder is."""
        if not self._local:
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_plain(name: str) -> None:
    """Raises `ArtifactError` unless it names a file or folder, and no way to another."""
    if not _PLAIN_NAME.fullmatch(name):
        raise ArtifactError(f"{name!r} is not a plain name")


def write_slice(
    folder: Folder,
    name: str,
    shape: Sequence[int],
    start: int,
    flat: Tensor,
    writer: Writer,
) -> Slice:
    """Writes a rank's flat slice of a parameter, beginning at element `start`, durably."""
    if flat.dtype not in _NAMES:
        raise ArtifactError(
            f"{name}: dtype {flat.dtype} cannot be published; use float32 or bfloat16"
        )
    file = f"{name}.{writer}.safetensors"
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
    return Slice(name=name, shape=tuple(shape), dtype=_NAMES[flat.dtype], shard=shard)


def ordered(slices: Sequence[Slice]) -> tuple[Slice, ...]:
    """The slices of one parameter by their place in it.

    Raises `ArtifactError` if they leave a gap, overlap or do not agree.
    """
    found = sorted(slices, key=lambda piece: piece.shard.start)
    first = found[0]
    if any((piece.shape, piece.dtype) != (first.shape, first.dtype) for piece in found):
        raise ArtifactError(f"{first.name}: its slices differ in shape or dtype")
    check_whole(first.name, [piece.shard for piece in found], torch.Size(first.shape).numel())
    return tuple(found)


def check_whole(name: str, shards: Sequence[Shard], elements: int) -> None:
    """Raises `ArtifactError` unless the shards, in order, are elements `[0, elements)`."""
    reached = 0
    for shard in shards:
        if shard.start != reached:
            raise ArtifactError(f"{name}: the next slice begins at {shard.start}, not at {reached}")
        reached = shard.end
    if reached != elements:
        raise ArtifactError(f"{name}: its slices end at {reached}, not at {elements}")


def read_shard(folder: Folder, name: str, shard: Shard) -> Tensor:
    """A shard's elements, flat, verified against its digest."""
    content = torch.empty(shard.bytes, dtype=torch.uint8)
    _read(folder, shard, [content])
    length = min(int.from_bytes(bytes(raw(content[:_LENGTH_BYTES])), "little"), shard.bytes)
    dtype = _stored_dtype(folder, name, shard, bytes(raw(content[: _LENGTH_BYTES + length])))
    return content[_LENGTH_BYTES + length :].view(dtype)


def read_shard_into(folder: Folder, name: str, shard: Shard, place: Tensor) -> None:
    """A shard's elements into `place`, flat and of its dtype; trust them only if nothing is raised.

    The file's bytes are read and hashed where they are to stay, so none is copied.
    """
    header = torch.empty(max(shard.bytes - place.nbytes, 0), dtype=torch.uint8)
    _read(folder, shard, [header, place.view(torch.uint8)])
    dtype = _stored_dtype(folder, name, shard, bytes(raw(header)))
    if dtype != place.dtype:
        raise ArtifactError(f"{folder}/{shard.file} holds {dtype}, its manifest says {place.dtype}")


def _read(folder: Folder, shard: Shard, parts: Sequence[Tensor]) -> None:
    """Fills the parts, of bytes, with the file's content, which they must hold exactly."""
    path = f"{folder}/{shard.file}"
    digest = hashlib.sha256()
    try:
        with folder.open(shard.file) as stream:
            for part in parts:
                digest.update(_fill(stream, part))
            while rest := stream.read(1 << 20):
                digest.update(rest)
    except FileNotFoundError as error:
        raise ShardMissing(f"{path} is named by the manifest and not there") from error
    if digest.hexdigest() != shard.sha256:
        raise DigestMismatch(path, shard.sha256, digest.hexdigest())


def _fill(stream: io.FileIO | io.BytesIO, part: Tensor) -> memoryview:
    """The bytes read: fewer than `part` has if the file ends before."""
    view, filled = memoryview(raw(part)), 0
    while filled < len(view) and (count := stream.readinto(view[filled:])):
        filled += count
    return view[:filled]


def _stored_dtype(folder: Folder, name: str, shard: Shard, header: bytes) -> torch.dtype:
    """The dtype of the elements; by the header they are this parameter, and all there is."""
    path = f"{folder}/{shard.file}"
    length, text = int.from_bytes(header[:_LENGTH_BYTES], "little"), header[_LENGTH_BYTES:]
    try:
        described = json.loads(text[:length])[name]
        shape, kind, place = (described[key] for key in ("shape", "dtype", "data_offsets"))
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is not a safetensors file that holds {name}") from error
    elements, dtype = shard.end - shard.start, _STORED.get(kind)
    if dtype is None:
        raise ArtifactError(f"{path}: dtype {kind} cannot be read; F32 and BF16 can")
    content_bytes = elements * dtype.itemsize
    if shape != [elements]:
        raise ArtifactError(f"{path}: shape {shape}, not {elements} elements")
    if (
        length != len(text)
        or place != [0, content_bytes]
        or len(header) + content_bytes != shard.bytes
    ):
        raise ArtifactError(f"{path} is not {elements} elements of {kind} and nothing else")
    return dtype


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
