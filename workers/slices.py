"""Parameters as flat slices in safetensors files: each rank writes its own, anyone reads any.

A slice is of the parameter's row-major elements, `[start, end)`. Owns the files of slices and
their digests; knows neither what a folder means nor who writes it.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from workers.contract import DType, Record
from workers.errors import ArtifactError, DigestMismatch, ShardMissing
from workers.folders import Folder

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
