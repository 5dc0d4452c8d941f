"""Which hyperparameters a model gets."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from workers import presets
from workers.contract import Hparams
from workers.errors import BadHparams
from workers.models import ModelFacts, read_facts
from workers.plan_parameters import shapes
from workers.selection import select


def facts(model_type: str, layers: int, hidden: int, **config: Any) -> ModelFacts:
    sizes = {"model_type": model_type, "num_hidden_layers": layers, "hidden_size": hidden}
    return ModelFacts(
        path=Path("model"),
        architecture="AnyForCausalLM",
        model_type=model_type,
        hidden_size=hidden,
        num_hidden_layers=layers,
        context=128,
        dtype="bfloat16",
        config={**sizes, **config},
    )


QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}
COLUMNS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
COLUMNS += ("num_key_value_heads",)
PUBLISHED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "demo": (
        (3, 256, 3072, 4, 4),
        {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 4096,
            "tie_word_embeddings": True,
        },
    ),
    "llama3-8b": (
        (32, 4096, 14336, 32, 8),
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256},
    ),
    "mistral-7b": (
        (32, 4096, 14336, 32, 8),
        {"architectures": ["MistralForCausalLM"], "vocab_size": 32000},
    ),
    "qwen1.5-moe": (
        (24, 2048, 5632, 16, 16),
        {
            "architectures": ["Qwen2MoeForCausalLM"],
            "vocab_size": 151936,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen2.5-7b": ((28, 3584, 18944, 28, 4), QWEN2),
    "qwen2.5-14b": ((48, 5120, 13824, 40, 8), QWEN2),
    "qwen2.5-32b": ((64, 5120, 27648, 40, 8), QWEN2),
    "qwen2.5-72b": ((80, 8192, 29568, 64, 8), QWEN2),
    "qwen3-8b": ((36, 4096, 12288, 32, 8), QWEN3),
    "qwen3-14b": ((40, 5120, 17408, 40, 8), QWEN3),
    "qwen3-32b": ((64, 5120, 25600, 64, 8), QWEN3),
    "qwen3-30b-a3b": (
        (48, 2048, 6144, 32, 4),
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "vocab_size": 151936,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
}
"""Sizes in the models' own `config.json`, by the file that is to be theirs."""


def write_config(name: str, path: Path) -> Any:
    """The model's `config.json`, as published; returns its class."""
    sizes, others = PUBLISHED[name]
    kind = getattr(transformers, others["architectures"][0])
    values = dict(zip(COLUMNS, sizes, strict=True), model_type=kind.config_class.model_type)
    values |= {"max_position_embeddings": 4096, "torch_dtype": "bfloat16", **others}
    (path / "config.json").write_text(json.dumps(values))
    return kind


LLAMA = facts("llama", 32, 4096, vocab_size=128256)
UNKNOWN = facts("olmo2", 40, 5120)
FULL_MISTRAL = facts(
    "mistral",
    32,
    4096,
    vocab_size=32000,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@pytest.mark.parametrize(
    ("model", "parameter", "learning_rate"),
    [
        (LLAMA, "model.layers.22.mlp.down_proj.weight", 5e-4),
        (facts("mistral", 32, 4096), "model.layers.23", 5e-5),
        (facts("qwen2", 28, 3584), "model.layers.6.mlp.down_proj.weight", 5e-4),
        (facts("qwen2", 80, 8192), "model.layers.19.mlp.down_proj.weight", 5e-4),
        (
            facts("qwen2_moe", 24, 2048),
            "model.layers.20.mlp.shared_expert.down_proj.weight",
            5e-4,
        ),
    ],
)
def test_the_papers_values(model: ModelFacts, parameter: str, learning_rate: float) -> None:
    assert presets.load(model, None, {}) == Hparams(
        parameters=(parameter,), learning_rate=learning_rate, dtype="bfloat16"
    )


def test_every_file_is_of_a_model_and_has_a_source() -> None:
    files = sorted(presets.PRESETS.glob("*.yaml"))
    assert {file.stem for file in files} == PUBLISHED.keys()
    for file in files:
        assert file.read_text().startswith("# ")
        assert {"model_type", "hidden_size", "num_hidden_layers"} <= yaml.safe_load(
            file.read_text()
        )["match"].keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_is_its_models_alone_and_names_what_the_model_has(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = write_config(name, tmp_path)
    model_facts = read_facts(tmp_path / "config.json")
    fitting = []
    for file in presets.PRESETS.glob("*.yaml"):
        with contextlib.suppress(BadHparams):
            fitting.append((file.stem, presets.load(model_facts, file, {})))
    assert [fit for fit, _ in fitting] == [name]
    found = presets.load(model_facts, None, {})
    assert found == fitting[0][1]
    assert not caplog.records
    with torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(tmp_path))
    own = {parameter: tuple(value.shape) for parameter, value in model.named_parameters()}
    assert select(own, found.parameters)
    assert shapes(model_facts) == own


def test_a_whole_layer_and_several_tensors() -> None:
    names = shapes(FULL_MISTRAL)
    layer = select(names, presets.load(FULL_MISTRAL, None, {}).parameters)
    assert len(layer) == 9
    assert all(name.startswith("model.layers.23.") for name in layer)
    several = {"parameters": ["model.layers.30.mlp.up_proj.weight", "model.layers.4.mlp"]}
    chosen = select(names, presets.load(FULL_MISTRAL, None, several).parameters)
    assert [name.rsplit(".", 2)[1] for name in chosen] == [
        "gate_proj",
        "up_proj",
        "down_proj",
        "up_proj",
    ]


@pytest.mark.parametrize(
    ("model", "parameter"),
    [
        (UNKNOWN, "model.layers.9.mlp.down_proj.weight"),
        (facts("qwen2", 36, 2048), "model.layers.8.mlp.down_proj.weight"),
        (facts("qwen3_moe", 94, 4096), "model.layers.20.mlp.experts.down_proj"),
    ],
)
def test_other_models_at_the_proportional_depth(
    model: ModelFacts, parameter: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = presets.load(model, None, {})
    assert found.parameters == (parameter,)
    assert found.dtype == model.dtype
    assert parameter in caplog.text
    assert "learning rate of 0.0005" in caplog.text


def test_overrides_replace_single_fields() -> None:
    found = presets.load(LLAMA, None, {"learning_rate": 1e-3, "max_epochs": 3})
    assert (found.learning_rate, found.max_epochs, found.batch_size) == (1e-3, 3, 100)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learning_rate": 7}, r"hparams\.learning_rate: 7 is wrong: .* less than or equal to 1"),
        ({"batch_size": "many"}, r"hparams\.batch_size: 'many' is wrong: .* valid integer"),
        ({"parameters": []}, r"hparams\.parameters: \[\] is wrong: .* at least 1 item"),
        ({"dtype": "float16"}, r"hparams\.dtype: 'float16' is wrong: .* 'float32' or 'bfloat16'"),
        ({"lr": 1e-3}, r"hparams\.lr: no such hyperparameter; there are .*learning_rate"),
        ({"seed": -1, "max_epochs": 0}, r"hparams\.max_epochs: 0 .*; hparams\.seed: -1 "),
    ],
)
def test_bad_overrides_name_field_and_value(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(BadHparams, match=message):
        presets.load(LLAMA, None, overrides)


def test_a_file_takes_the_familys_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("parameters: [model.layers.1]\nlearning_rate: 1.0e-2\n")
    found = presets.load(LLAMA, file, {"seed": 4})
    assert found == Hparams(parameters=("model.layers.1",), learning_rate=1e-2, seed=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("match: {model_type: qwen2}\nlearning_rate: 0.1\n", "does not fit the model"),
        ("learning_rate: 0.1\n", r"hparams\.parameters \(from .*mine\.yaml\): required"),
        ("learning_rate: [\n", "not valid YAML"),
        ("- learning_rate\n", "must hold a mapping"),
        ("match: qwen2\n", "must hold a mapping"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(BadHparams, match=message) as caught:
        presets.load(LLAMA, file, {})
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadHparams, match=r"mine\.yaml: cannot be read"):
        presets.load(LLAMA, tmp_path / "mine.yaml", {})
