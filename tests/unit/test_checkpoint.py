"""A run's checkpoints: written by some ranks, read by any other number; the newest good one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.disk import full
from workers import checkpoint
from workers.checkpoint import Checkpoints, Piece
from workers.errors import ArtifactError, DigestMismatch, TrainingFailed
from workers.locft import State
from workers.slices import Slice, Writer

JOB = "job_1"
WEIGHT = torch.arange(35.0).view(5, 7)


def state(epoch: int) -> State:
    return State(epoch=epoch, batches=3, steps=9, resting={4: (2, 3, 0.001)}, total=8)


def attempt(store: Path, name: str = "a", ranks: int = 2) -> list[Checkpoints]:
    """Each rank's."""
    return [Checkpoints(str(store), JOB, Writer(rank, ranks, name)) for rank in range(ranks)]


def save(ranks: list[Checkpoints], at: State, weight: Tensor) -> None:
    """As `ranks` would, each with its slice; the first one writes last here."""
    width = -(-weight.numel() // len(ranks))
    flats = torch.split(weight.flatten(), width)
    written: list[Slice] = []

    def gather(mine: list[Slice]) -> list[Slice]:
        written.extend(mine)
        return written

    for rank, kept in reversed(list(enumerate(ranks))):
        piece = Piece("w.master", tuple(weight.shape), rank * width, flats[rank])
        kept.save(at, [piece], gather)


def test_any_number_of_ranks_reads_what_two_wrote(tmp_path: Path) -> None:
    save(attempt(tmp_path), state(2), WEIGHT)
    saved = checkpoint.newest(str(tmp_path), JOB)
    assert saved is not None
    assert saved.state == state(2)
    for start, end in ((0, 35), (0, 12), (12, 24), (24, 35), (17, 19)):
        assert torch.equal(saved.read("w.master", start, end), WEIGHT.flatten()[start:end])
    with pytest.raises(ArtifactError, match=r"no tensor x\.master; the job tunes other parameters"):
        saved.read("x.master", 0, 1)


def test_only_the_newest_is_kept_and_an_unfinished_one_is_not_seen(tmp_path: Path) -> None:
    ranks = attempt(tmp_path)
    save(ranks, state(2), WEIGHT)
    save(ranks, state(3), WEIGHT + 1)
    folder = tmp_path / "checkpoints" / JOB
    assert [path.name for path in folder.iterdir()] == ["00003-0000003-a"]
    (folder / "00004-0000000-b").mkdir()
    saved = checkpoint.newest(str(tmp_path), JOB)
    assert saved is not None
    assert saved.state.epoch == 3
    checkpoint.discard(str(tmp_path), JOB)
    assert checkpoint.newest(str(tmp_path), JOB) is None


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    ranks = attempt(tmp_path)
    save(ranks, state(2), WEIGHT)
    message = r"checkpoint cannot be written .*needs room"
    with full(50), pytest.raises(TrainingFailed, match=message):
        save(ranks, state(3), WEIGHT)
    saved = checkpoint.newest(str(tmp_path), JOB)
    assert saved is not None
    assert torch.equal(saved.read("w.master", 0, 35), WEIGHT.flatten())
    assert [path.name for path in (tmp_path / "checkpoints" / JOB).iterdir()] == ["00002-0000003-a"]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    ranks = attempt(tmp_path)
    save(ranks, state(2), WEIGHT)
    with pytest.raises(TrainingFailed, match=r"w\.master is not finite .*the one before is kept"):
        save(ranks, state(3), WEIGHT / 0)
    saved = checkpoint.newest(str(tmp_path), JOB)
    assert saved is not None
    assert saved.state.epoch == 2


def test_a_spoilt_checkpoint_is_not_used(tmp_path: Path) -> None:
    save(attempt(tmp_path), state(2), WEIGHT)
    [shard, *_] = sorted((tmp_path / "checkpoints" / JOB).rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    saved = checkpoint.newest(str(tmp_path), JOB)
    assert saved is not None
    with pytest.raises(DigestMismatch, match=shard.name):
        saved.read("w.master", 0, 35)


def test_an_attempt_that_is_no_longer_wanted_removes_nothing_of_the_one_after(
    tmp_path: Path,
) -> None:
    old = attempt(tmp_path, "old")
    save(old, state(2), WEIGHT)
    new = attempt(tmp_path, "new", ranks=3)
    save(old, state(3), WEIGHT + 1)
    save(new, state(3), WEIGHT + 2)
    save(old, state(4), WEIGHT + 3)
    folder = tmp_path / "checkpoints" / JOB
    assert {path.name for path in folder.iterdir()} == {"00003-0000003-new", "00004-0000003-old"}
    save(new, state(5), WEIGHT + 4)
    saved = checkpoint.newest(str(tmp_path), JOB)
    assert saved is not None
    assert torch.equal(saved.read("w.master", 0, 35), (WEIGHT + 4).flatten())
