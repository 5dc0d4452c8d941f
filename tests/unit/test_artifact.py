"""The version store: slices, the manifest last, and what a reader refuses."""

import hashlib
import json
import pickle
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.stored_tensors import read_tensors
from workers import artifact
from workers.artifact import Lineage, Manifest
from workers.contract import Hparams, TrainResult
from workers.errors import (
    ArtifactError,
    BaseMismatch,
    DigestMismatch,
    ManifestMissing,
    ShardMissing,
)
from workers.folders import Folder
from workers.slices import Slice, Writer

NAME = "model.layers.1.mlp.down_proj.weight"
OTHER = "model.layers.1.input_layernorm.weight"
BASE = "sha256:base"
SHAPE = (5, 7)


def lineage(version_id: str = "v1", base_fingerprint: str = BASE) -> Lineage:
    return Lineage(
        version_id=version_id,
        parent_id=None,
        job_id="job_1",
        base_fingerprint=base_fingerprint,
        hparams=Hparams(parameters=(NAME,), learning_rate=1e-3),
        edits=("ed_1", "ed_2"),
        training=TrainResult(
            version_id=version_id, epochs=1, steps=2, epoch_losses=(0.5,), seconds={"train": 1.0}
        ),
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
    )


def values(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        NAME: torch.randn(SHAPE, generator=generator).to(dtype),
        OTHER: torch.randn(3, generator=generator).to(dtype),
    }


def write_slices(
    store: str, tensors: dict[str, Tensor], ranks: int = 2, attempt: str = "first"
) -> list[Slice]:
    """As `ranks` ranks would: equal widths, the last one short."""
    slices = []
    for name, tensor in tensors.items():
        width = -(-tensor.numel() // ranks)
        for rank, flat in enumerate(torch.split(tensor.flatten(), width)):
            start, writer = rank * width, Writer(rank, ranks, attempt)
            slices.append(
                artifact.write_slice(store, "v1", name, tensor.shape, start, flat, writer)
            )
    return slices


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def version(store: str) -> Manifest:
    return artifact.write_manifest(store, lineage(), write_slices(store, values()))


@pytest.fixture
def shard(store: str, version: Manifest) -> Path:
    """The second shard of the weight."""
    [entry] = [entry for entry in version.tensors if entry.name == NAME]
    return Path(store) / "versions" / "v1" / entry.shards[1].file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_reads_back_what_was_written(store: str, dtype: torch.dtype, ranks: int) -> None:
    written = values(dtype)
    artifact.write_manifest(store, lineage(), write_slices(store, written, ranks))
    manifest = artifact.read_manifest(store, "v1", BASE)
    found = read_tensors(store, manifest)
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)
    digests = {name: artifact.tensor_digest(tensor) for name, tensor in written.items()}
    assert manifest.digest == artifact.digest_of(digests)


def test_any_fsspec_url_is_a_store() -> None:
    store = "memory://test_any_fsspec_url"
    written = values()
    manifest = artifact.write_manifest(store, lineage(), write_slices(store, written))
    assert artifact.read_manifest(store, "v1") == manifest
    assert torch.equal(read_tensors(store, manifest)[NAME], written[NAME])
    fsspec.filesystem("memory").rm("/test_any_fsspec_url", recursive=True)


@pytest.mark.parametrize(("start", "end"), [(0, 35), (0, 18), (18, 35), (5, 30), (17, 19), (7, 7)])
def test_reads_any_slice(store: str, version: Manifest, start: int, end: int) -> None:
    found = artifact.read_slice(store, version, NAME, start, end)
    assert torch.equal(found, values()[NAME].flatten()[start:end])


def test_a_slice_reads_only_its_own_shards(store: str, version: Manifest, shard: Path) -> None:
    shard.unlink()
    assert artifact.read_slice(store, version, NAME, 0, 18).numel() == 18
    with pytest.raises(ShardMissing, match=shard.name):
        artifact.read_slice(store, version, NAME, 0, 19)


@pytest.mark.parametrize(("name", "end"), [(NAME, 36), ("model.norm.weight", 1)])
def test_a_slice_that_is_not_there(store: str, version: Manifest, name: str, end: int) -> None:
    with pytest.raises(ArtifactError, match=name):
        artifact.read_slice(store, version, name, 0, end)


def test_no_manifest_no_version(store: str) -> None:
    write_slices(store, values())
    assert not artifact.exists(store, "v1")
    with pytest.raises(ManifestMissing, match="version v1"):
        artifact.read_manifest(store, "v1")


def test_the_manifest_is_the_last_file_written(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash before the rename leaves no version."""
    slices = write_slices(store, values())

    def crash(*paths: str) -> None:
        raise OSError("crash")

    with monkeypatch.context() as patched:
        patched.setattr("os.link", crash)
        with pytest.raises(OSError, match="crash"):
            artifact.write_manifest(store, lineage(), slices)
    assert not artifact.exists(store, "v1")
    artifact.write_manifest(store, lineage(), slices)
    assert sorted(path.name for path in (Path(store) / "versions/v1").iterdir()) == sorted(
        [artifact.MANIFEST, *(piece.shard.file for piece in slices)]
    )


READERS: dict[str, Callable[[str, Manifest], Any]] = {
    "whole tensors": lambda store, version: read_tensors(store, version),
    "a slice": lambda store, version: artifact.read_slice(store, version, NAME, 20, 21),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_names_file_and_digests(
    store: str, version: Manifest, shard: Path, reader: str
) -> None:
    damaged = bytearray(shard.read_bytes())
    damaged[-3] ^= 4
    shard.write_bytes(damaged)
    with pytest.raises(DigestMismatch) as caught:
        READERS[reader](store, version)
    [entry] = [entry for entry in version.tensors if entry.name == NAME]
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.name == str(shard)
    assert error.expected == entry.shards[1].sha256
    assert error.found != error.expected
    for part in (error.name, error.expected, error.found):
        assert part in str(error)


def test_a_truncated_shard(store: str, version: Manifest, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(DigestMismatch, match=shard.name):
        read_tensors(store, version)


def test_a_missing_shard(store: str, version: Manifest, shard: Path) -> None:
    shard.unlink()
    with pytest.raises(ShardMissing, match=shard.name):
        read_tensors(store, version)


def test_a_shard_with_more_in_it(store: str, version: Manifest, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + b"more")
    with pytest.raises(DigestMismatch, match=shard.name):
        read_tensors(store, version)


def _as_if_published(version: Manifest, shard: Path, content: bytes) -> Manifest:
    """The version, had its weight's second shard been written with this content."""
    shard.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    [weight] = [entry for entry in version.tensors if entry.name == NAME]
    described = weight.shards[1].model_copy(update={"sha256": sha256, "bytes": len(content)})
    changed = weight.model_copy(update={"shards": (weight.shards[0], described)})
    return version.model_copy(update={"tensors": (changed,)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors.torch.save({OTHER: torch.zeros(17)}), f"that holds {NAME}"),
        (safetensors.torch.save({NAME: torch.zeros(16)}), r"shape \[16\], not 17 elements"),
        (safetensors.torch.save({NAME: torch.zeros(17, dtype=torch.float64)}), "F64 cannot"),
        (
            safetensors.torch.save({NAME: torch.zeros(17), OTHER: torch.zeros(1)}),
            "and nothing else",
        ),
        (b"\x40" + bytes(7) + b"{" * 64 + bytes(68), f"that holds {NAME}"),
        (b"[]", f"that holds {NAME}"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_was_published_wrong(
    store: str, version: Manifest, shard: Path, reader: str, content: bytes, message: str
) -> None:
    wrong = _as_if_published(version, shard, content)
    with pytest.raises(ArtifactError, match=message):
        READERS[reader](store, wrong)


@pytest.mark.parametrize("more", [-8, -1, 8])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_is_of_the_bytes_its_manifest_says(
    store: str, version: Manifest, shard: Path, reader: str, more: int
) -> None:
    wrong = _as_if_published(version, shard, shard.read_bytes())
    [weight] = wrong.tensors
    second = weight.shards[1].model_copy(update={"bytes": weight.shards[1].bytes + more})
    weight = weight.model_copy(update={"shards": (weight.shards[0], second)})
    with pytest.raises(ArtifactError, match=shard.name):
        READERS[reader](store, wrong.model_copy(update={"tensors": (weight,)}))


def test_a_tensor_is_of_the_dtype_its_manifest_says(
    store: str, version: Manifest, shard: Path
) -> None:
    content = safetensors.torch.save({NAME: torch.zeros(17, dtype=torch.bfloat16)})
    wrong = _as_if_published(version, shard, content)
    with pytest.raises(ArtifactError, match=shard.name):
        read_tensors(store, wrong)


def test_a_manifest_whose_shards_are_not_the_whole(store: str, version: Manifest) -> None:
    shapes = tuple(entry.model_copy(update={"shape": (6, 7)}) for entry in version.tensors)
    with pytest.raises(ArtifactError, match="slices end at 3, not at 42"):
        read_tensors(store, version.model_copy(update={"tensors": shapes}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_manifest_knows_the_bytes_in_memory(store: str, dtype: torch.dtype) -> None:
    manifest = artifact.write_manifest(store, lineage(), write_slices(store, values(dtype)))
    tensors = read_tensors(store, manifest)
    assert manifest.bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_whole_tensors_are_verified_too(store: str, version: Manifest) -> None:
    tensors = tuple(entry.model_copy(update={"sha256": "0" * 64}) for entry in version.tensors)
    with pytest.raises(DigestMismatch, match=f"tensor {OTHER}: expected sha256 0000"):
        read_tensors(store, version.model_copy(update={"tensors": tensors}))


def test_a_manifest_of_another_base(store: str, version: Manifest) -> None:
    with pytest.raises(BaseMismatch, match=r"v1 was made from .*sha256:base, .* sha256:other"):
        artifact.read_manifest(store, "v1", "sha256:other")


def _cut(text: str) -> str:
    return text[:100]


def _rename_field(text: str) -> str:
    return text.replace('"tensors"', '"weights"')


def _later_format(text: str) -> str:
    return json.dumps({**json.loads(text), "format": 2})


def _other_version(text: str) -> str:
    return text.replace('"version_id": "v1"', '"version_id": "v2"')


def _file_elsewhere(text: str) -> str:
    return text.replace('"file": "', '"file": "../v2/')


@pytest.mark.parametrize(
    "damage", [_cut, _rename_field, _later_format, _other_version, _file_elsewhere]
)
def test_a_manifest_that_cannot_be_trusted(
    store: str, version: Manifest, damage: Callable[[str], str]
) -> None:
    path = Path(store) / "versions/v1" / artifact.MANIFEST
    path.write_text(damage(path.read_text()))
    with pytest.raises(ArtifactError, match=str(path)):
        artifact.read_manifest(store, "v1")


def test_a_finished_version_is_never_written_again(store: str, version: Manifest) -> None:
    again: list[Callable[[], Any]] = [
        lambda: write_slices(store, values()),
        lambda: artifact.write_manifest(store, lineage(), []),
    ]
    for attempt in again:
        with pytest.raises(ArtifactError, match="finished version"):
            attempt()


def test_leftovers_of_other_attempts_are_removed(store: str) -> None:
    write_slices(store, values(), ranks=5, attempt="another")
    manifest = artifact.write_manifest(store, lineage(), write_slices(store, values()))
    files = {path.name for path in (Path(store) / "versions/v1").glob("*.safetensors")}
    assert files == {shard.file for entry in manifest.tensors for shard in entry.shards}


def test_the_first_attempt_to_finish_makes_the_version(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at the same moment, each of which has seen no manifest."""
    slow = write_slices(store, values(), attempt="slow")
    fast = write_slices(store, {name: -tensor for name, tensor in values().items()})
    made: list[Manifest] = []
    write_last = Folder.write_last

    def overtaken(folder: Folder, file: str, payload: bytes) -> None:
        monkeypatch.setattr(Folder, "write_last", write_last)
        made.append(artifact.write_manifest(store, lineage(), fast))
        write_last(folder, file, payload)

    monkeypatch.setattr(Folder, "write_last", overtaken)
    with pytest.raises(ArtifactError, match="finished version"):
        artifact.write_manifest(store, lineage(), slow)
    assert [artifact.read_manifest(store, "v1")] == made
    for entry in made[0].tensors:
        expected = -values()[entry.name]
        assert torch.equal(artifact.read_tensor(store, "v1", entry), expected)
    files = {path.name for path in (Path(store) / "versions/v1").iterdir()}
    shards = {shard.file for entry in made[0].tensors for shard in entry.shards}
    assert files == {artifact.MANIFEST, *shards}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (slice(1, None), "begins at 18, not at 0"),
        (slice(None, 1), "slices end at 18, not at 35"),
    ],
)
def test_slices_must_make_the_whole(store: str, kept: slice, message: str) -> None:
    slices = write_slices(store, {NAME: values()[NAME]})
    with pytest.raises(ArtifactError, match=message):
        artifact.write_manifest(store, lineage(), slices[kept])
    assert not artifact.exists(store, "v1")


def test_slices_must_agree(store: str) -> None:
    first, second = write_slices(store, {NAME: values()[NAME]})
    with pytest.raises(ArtifactError, match="differ in shape or dtype"):
        artifact.write_manifest(
            store, lineage(), [first, second.model_copy(update={"shape": (1,)})]
        )


def test_other_dtypes_are_refused(store: str) -> None:
    flat = torch.zeros(2, dtype=torch.float16)
    with pytest.raises(ArtifactError, match=r"torch\.float16 cannot be published"):
        artifact.write_slice(store, "v1", NAME, (2,), 0, flat, Writer(0, 1, "first"))


@pytest.mark.parametrize("version_id", ["..", "../v1", "v1/v2", ""])
def test_a_version_id_is_a_plain_name(store: str, version_id: str) -> None:
    with pytest.raises(ArtifactError, match="not a plain name"):
        artifact.read_manifest(store, version_id)
