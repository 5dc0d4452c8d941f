"""Where modules have the rows of a batch, over architectures."""

import pytest

from service.replica.row_layout import RowLayout, row_layouts
from tests.architectures import tiny

TOKENS = RowLayout((1,), (1,), positions=False)


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        ("LlamaForCausalLM", []),
        ("Qwen2ForCausalLM", []),
        ("Qwen3MoeForCausalLM", []),
        ("Olmo2ForCausalLM", []),
        ("Phi3ForCausalLM", []),
        # Its sinks are a parameter of the attention itself.
        ("GptOssForCausalLM", [f"model.layers.{layer}.self_attn" for layer in range(4)]),
    ],
)
def test_all_modules_but_attention_work_row_by_row(architecture: str, attention: list[str]) -> None:
    model = tiny(architecture)
    layouts = row_layouts(model)
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert sorted(owners - set(layouts)) == attention
    assert {layouts[f"model.layers.{layer}.self_attn.o_proj"] for layer in range(4)} == {TOKENS}
    assert layouts["lm_head"] == RowLayout((1,), (1,), positions=True)


def test_experts_and_their_router() -> None:
    layouts = row_layouts(tiny("Qwen2MoeForCausalLM"))
    assert layouts["model.layers.1.mlp.experts"] == RowLayout((0, 0, 0), (0,), positions=False)
    assert layouts["model.layers.1.mlp.gate"] == RowLayout((0,), (0, 0, 0), positions=False)


def test_rows_that_are_not_the_first_dimension() -> None:
    layouts = row_layouts(tiny("Gemma3ForCausalLM"))
    assert layouts["model.layers.0.self_attn.k_norm"] == RowLayout((2,), (2,), positions=False)


def test_modules_that_mix_rows_have_none() -> None:
    model = tiny("MambaForCausalLM")
    layouts = row_layouts(model)
    assert "backbone.layers.0.norm" in layouts
    assert not [name for name in layouts if "mixer" in name]
