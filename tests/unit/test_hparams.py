"""Which hyperparameters a model gets."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from workers import presets
from workers.contract import Hparams
from workers.errors import BadHparams
from workers.models import ModelFacts


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


LLAMA = facts("llama", 32, 4096, vocab_size=128256)
UNKNOWN = facts("olmo2", 40, 5120)


@pytest.mark.parametrize(
    ("model", "parameter", "learning_rate"),
    [
        (LLAMA, "model.layers.22.mlp.down_proj.weight", 5e-4),
        (facts("mistral", 32, 4096), "model.layers.23", 5e-5),
        (facts("qwen2", 28, 3584), "model.layers.6.mlp.down_proj.weight", 5e-4),
        (facts("qwen2", 80, 8192), "model.layers.19.mlp.down_proj.weight", 5e-4),
        (facts("qwen2_moe", 24, 2048), "model.layers.20.mlp.shared_expert.down_proj", 5e-4),
    ],
)
def test_the_papers_values(model: ModelFacts, parameter: str, learning_rate: float) -> None:
    assert presets.load(model, None, {}) == Hparams(
        parameters=(parameter,), learning_rate=learning_rate, dtype="bfloat16"
    )


def test_every_file_is_valid_and_has_a_source() -> None:
    files = sorted(presets.PRESETS.glob("*.yaml"))
    assert len(files) == 6
    for file in files:
        assert file.read_text().startswith("# ")
        match = yaml.safe_load(file.read_text())["match"]
        assert {"model_type", "hidden_size"} <= match.keys()
        matching = UNKNOWN.model_copy(update={"config": match})
        assert isinstance(presets.load(matching, file, {}), Hparams)


@pytest.mark.parametrize(
    ("model", "parameter"),
    [
        (UNKNOWN, "model.layers.9.mlp.down_proj.weight"),
        (facts("qwen2", 48, 5120), "model.layers.10.mlp.down_proj.weight"),
        (facts("qwen3_moe", 48, 2048), "model.layers.10.mlp.experts.down_proj"),
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
