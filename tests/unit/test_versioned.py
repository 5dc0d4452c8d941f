"""What a resident version has of its own, and a forward pass over rows of several versions."""

from typing import Any

import pytest
import torch

from service.errors import VersionRejected
from service.replica.row_layout import row_layouts
from service.replica.versioned import ResidentVersion, VersionedModel, resident, view
from tests.architectures import tiny

DOWN = "model.layers.1.mlp.down_proj.weight"


def changed(model: Any, *names: str, seed: int = 1) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [(name, torch.randn(parameters[name].shape, generator=generator)) for name in names]


def test_a_version_has_only_what_it_edits() -> None:
    base = tiny("Qwen2ForCausalLM")
    bias = "model.layers.2.self_attn.q_proj.bias"
    version = resident(base, row_layouts(base), "v1", changed(base, DOWN, bias))
    assert sorted(version.modules) == [DOWN[:-7], bias[:-5]]
    whole = view(base, version.tensors)
    apart = [
        name
        for name, parameter in base.named_parameters()
        if whole.get_parameter(name).data_ptr() != parameter.data_ptr()
    ]
    assert sorted(apart) == [DOWN, bias]
    own, shared = version.modules[bias[:-5]], base.get_submodule(bias[:-5])
    assert own.weight is shared.weight
    assert own.bias is version.tensors[bias]


def test_tied_parameters_stay_tied() -> None:
    base = tiny("Gemma3ForCausalLM")
    assert base.lm_head.weight is base.model.embed_tokens.weight
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        version = resident(base, row_layouts(base), "v1", changed(base, name))
        assert sorted(version.modules) == ["lm_head", "model.embed_tokens"]
        assert version.modules["lm_head"].weight is version.modules["model.embed_tokens"].weight


SINKS = "model.layers.1.self_attn.sinks"


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        (SINKS, torch.ones(4), f"{SINKS!r}.*GptOssAttention"),
        ("model.norm.weight", torch.full((32,), torch.nan), "not finite"),
        ("model.norm.weight", torch.ones(2), r"\(2,\).*\(32,\)"),
        ("model.nothing", torch.ones(2), "no parameter 'model.nothing'"),
    ],
)
def test_what_cannot_be_run_is_rejected(name: str, value: torch.Tensor, problem: str) -> None:
    base = tiny("GptOssForCausalLM")
    with pytest.raises(VersionRejected, match=problem):
        resident(base, row_layouts(base), "v1", [(name, value)])


def test_each_row_is_its_own_versions() -> None:
    base = tiny("Qwen3MoeForCausalLM")
    layouts = row_layouts(base)
    names = ("model.layers.1.mlp.experts.down_proj", "model.norm.weight", "lm_head.weight")
    versions = [
        resident(base, layouts, f"v{seed}", changed(base, *names[: seed + 1], seed=seed))
        for seed in (1, 2)
    ]
    shared = VersionedModel(base)
    for version in versions:
        shared.admit(version, layouts)
    versions.insert(0, ResidentVersion("v0", {}, {}))
    order = [versions[index] for index in (0, 0, 1, 2, 2)]
    shared.rows.lay_out([(version, 1, True) for version in order])
    ids = torch.arange(5, 10)[None]
    alone = torch.eye(5).bool()[None, None]  # Each token sees itself only.
    with torch.no_grad():
        logits = shared.model(ids, attention_mask=alone, logits_to_keep=torch.arange(5)).logits[0]
        for row, version in enumerate(order):
            expected = view(base, version.tensors)(ids, attention_mask=alone).logits[0, row]
            torch.testing.assert_close(logits[row], expected)
