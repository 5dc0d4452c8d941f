"""A run's checkpoints: written by some ranks, read by any other number; the newest good one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.disk import full
from workers import checkpoint
from workers.checkpoint import Piece
from workers.errors import ArtifactError, DigestMismatch, TrainingFailed
from workers.locft import State
from workers.slices import Slice

JOB = "job_1"
WEIGHT = torch.arange(35.0).view(5, 7)


def state(epoch: int) -> State:
    return State(epoch=epoch, batches=3, steps=9, resting={4: (2, 3, 0.001)}, total=8)


def save(store: Path, at: State, weight: Tensor, ranks: int = 2) -> None:
    """As `ranks` ranks would, each with its slice; the first one writes last here."""
    width = -(-weight.numel() // ranks)
    flats = weight.flatten().split(width)
    written: list[Slice] = []

    def gather(mine: list[Slice]) -> list[Slice]:
        written.extend(mine)
        return written

    for rank in reversed(range(ranks)):
        piece = Piece("w.master", tuple(weight.shape), rank * width, flats[rank])
        checkpoint.save(str(store), JOB, at, [piece], rank, ranks, gather)


def test_any_number_of_ranks_reads_what_two_wrote(tmp_path: Path) -> None:
    save(tmp_path, state(2), WEIGHT)
    saved = checkpoint.newest(str(tmp_path), JOB)
    assert saved is not None
    assert saved.state == state(2)
    for start, end in ((0, 35), (0, 12), (12, 24), (24, 35), (17, 19)):
        assert torch.equal(saved.read("w.master", start, end), WEIGHT.flatten()[start:end])
    with pytest.raises(ArtifactError, match=r"no tensor x\.master; the job tunes other parameters"):
        saved.read("x.master", 0, 1)


def test_only_the_newest_is_kept_and_an_unfinished_one_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, state(2), WEIGHT)
    save(tmp_path, state(3), WEIGHT + 1)
    folder = tmp_path / "checkpoints" / JOB
    assert [path.name for path in folder.iterdir()] == ["00003-0000003"]
    (folder / "00004-0000000").mkdir()
    saved = checkpoint.newest(str(tmp_path), JOB)
    assert saved is not None
    assert saved.state.epoch == 3
    checkpoint.discard(str(tmp_path), JOB)
    assert checkpoint.newest(str(tmp_path), JOB) is None


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    save(tmp_path, state(2), WEIGHT)
    message = r"checkpoint cannot be written .*needs room"
    with full(50), pytest.raises(TrainingFailed, match=message):
        save(tmp_path, state(3), WEIGHT)
    saved = checkpoint.newest(str(tmp_path), JOB)
    assert saved is not None
    assert torch.equal(saved.read("w.master", 0, 35), WEIGHT.flatten())
    assert [path.name for path in (tmp_path / "checkpoints" / JOB).iterdir()] == ["00002-0000003"]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    save(tmp_path, state(2), WEIGHT)
    with pytest.raises(TrainingFailed, match=r"w\.master is not finite .*the one before is kept"):
        save(tmp_path, state(3), WEIGHT / 0)
    saved = checkpoint.newest(str(tmp_path), JOB)
    assert saved is not None
    assert saved.state.epoch == 2


def test_a_spoilt_checkpoint_is_not_used(tmp_path: Path) -> None:
    save(tmp_path, state(2), WEIGHT)
    [shard, *_] = sorted((tmp_path / "checkpoints" / JOB).rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    saved = checkpoint.newest(str(tmp_path), JOB)
    assert saved is not None
    with pytest.raises(DigestMismatch, match=shard.name):
        saved.read("w.master", 0, 35)
