"""Weights read in flat ranges are those that transformers loads, for every supported family."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.architectures import tiny
from workers import models
from workers.base_weights import BaseWeights
from workers.errors import UnsupportedModel


@pytest.mark.parametrize("architecture", models.SUPPORTED)
def test_any_range_of_any_parameter(architecture: str, tmp_path: Path) -> None:
    model: Any = tiny(architecture)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, architecture).from_pretrained(tmp_path)
    weights = BaseWeights(tmp_path)
    for name, parameter in loaded.named_parameters():
        flat, third = parameter.detach().flatten(), parameter.numel() // 3
        for start, end in ((0, len(flat)), (0, third), (third, len(flat)), (third, third)):
            assert torch.equal(weights.read(name, start, end), flat[start:end]), name


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    model: Any = tiny("LlamaForCausalLM")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    name = "model.layers.1.mlp.down_proj.weight"
    found = BaseWeights(tmp_path).read(name, 5, 500)
    assert torch.equal(found, model.get_parameter(name).detach().flatten()[5:500])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    tiny("LlamaForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"no file holds the weights of model\.layers\.9\.x"):
        BaseWeights(tmp_path).read("model.layers.9.x", 0, 1)
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight has 32 elements, .* 64"):
        BaseWeights(tmp_path).read("model.norm.weight", 0, 64)
