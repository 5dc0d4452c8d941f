"""The prefix's cache: in memory, in a file, and without room; what counts as below."""

from pathlib import Path

import pytest
import torch

from tests.disk import full
from workers.errors import BadHparams, TrainingFailed
from workers.examples import Example
from workers.frozen_prefix import HiddenStates, depth_of

SAMPLES = [Example(index, str(index), (1,) * (2 + index), (3, 4)) for index in (0, 2, 5)]
WIDTH = 16


@pytest.mark.parametrize(("budget", "in_file"), [(1 << 20, False), (0, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_come_back_in_any_order(
    tmp_path: Path, budget: int, in_file: bool, dtype: torch.dtype
) -> None:
    states = HiddenStates(SAMPLES, WIDTH, dtype, budget, tmp_path / "new" / "cache")
    kept = {s.index: torch.randn(len(s), WIDTH).to(dtype) for s in SAMPLES}
    states.put(SAMPLES[:2], torch.cat([kept[0], kept[2]]))
    states.put(SAMPLES[2:], kept[5])
    found = states.of([SAMPLES[2], SAMPLES[0]])
    assert torch.equal(found, torch.cat([kept[5], kept[0]]))
    assert (tmp_path / "new" / "cache").exists() == in_file
    states.close()
    assert not (tmp_path / "new" / "cache").exists()


def test_a_full_disk_is_a_clear_error_and_leaves_no_file(tmp_path: Path) -> None:
    message = r"hidden states need \d+ bytes in .*free some space"
    with full(100), pytest.raises(TrainingFailed, match=message):
        HiddenStates(SAMPLES, WIDTH, torch.float32, 0, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_the_depth_is_that_of_the_lowest_tuned_layer() -> None:
    down, norm = "model.layers.{}.mlp.down_proj.weight", "model.norm.weight"
    assert depth_of([down.format(20), down.format(3)], 24) == 3
    assert depth_of([norm], 24) == 24
    with pytest.raises(BadHparams, match=r"model\.embed_tokens\.weight is the embedding"):
        depth_of([down.format(3), "model.embed_tokens.weight"], 24)
