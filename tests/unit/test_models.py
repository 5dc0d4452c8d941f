"""Which base models are taken, and their fingerprint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workers import models
from workers.errors import IncompleteModel, UnsupportedModel

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"

MakeDirectory = Callable[..., Path]


@pytest.fixture
def make_directory(tmp_path: Path) -> MakeDirectory:
    def make(**changes: Any) -> Path:
        config = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "max_position_embeddings": 128,
            "dtype": "bfloat16",
            **changes,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer.json").write_text("{}")
        (tmp_path / SHARDS[0]).write_bytes(b"one")
        (tmp_path / SHARDS[1]).write_bytes(b"two")
        index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}}
        (tmp_path / INDEX).write_text(json.dumps(index))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16"), (None, "float32")],
)
def test_facts(make_directory: MakeDirectory, stored: str | None, dtype: str) -> None:
    path = make_directory(dtype=stored)
    facts = models.check(path)
    assert (facts.architecture, facts.model_type) == ("Qwen2ForCausalLM", "qwen2")
    assert (facts.hidden_size, facts.num_hidden_layers, facts.context) == (32, 3, 128)
    assert facts.dtype == dtype
    assert facts.path == path


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="nowhere does not exist"):
        models.check(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "*.safetensors", INDEX])
def test_a_file_that_is_not_there(make_directory: MakeDirectory, file: str) -> None:
    path = make_directory()
    for found in path.glob(file):
        found.unlink()
    with pytest.raises(IncompleteModel) as caught:
        models.check(path)
    assert f"has no {file}" in str(caught.value)


def test_weights_that_are_not_all_there(make_directory: MakeDirectory) -> None:
    path = make_directory()
    (path / SHARDS[1]).unlink()
    with pytest.raises(IncompleteModel, match=f"lacks 1 of the 2 files .* {SHARDS[1]} first"):
        models.check(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_an_index_that_cannot_be_read(make_directory: MakeDirectory, text: str) -> None:
    path = make_directory()
    (path / INDEX).write_text(text)
    with pytest.raises(UnsupportedModel, match=f"{INDEX} is not an index of weights"):
        models.check(path)


@pytest.mark.parametrize("architectures", [["Gemma2ForCausalLM"], [], None])
def test_an_architecture_that_is_not_supported(
    make_directory: MakeDirectory, architectures: list[str] | None
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        models.check(make_directory(architectures=architectures))
    for name in (*(architectures or ["none"]), *models.SUPPORTED):
        assert name in str(caught.value)


def test_quantized_weights(make_directory: MakeDirectory) -> None:
    with pytest.raises(UnsupportedModel, match="quantized"):
        models.check(make_directory(quantization_config={"quant_method": "mxfp4"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "does not hold a JSON object"),
        ('{"architectures": ["Qwen2ForCausalLM"]}', "does not state 'model_type'"),
    ],
)
def test_a_config_that_cannot_be_read(
    make_directory: MakeDirectory, text: str, message: str
) -> None:
    path = make_directory()
    (path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=message):
        models.check(path)


def test_resolves_a_directory(tmp_path: Path) -> None:
    assert models.resolve(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "~/nowhere", "nowhere"])
def test_neither_directory_nor_hub_id(model: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{model}.*: no such directory"):
        models.resolve(model)


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnsupportedModel, match=r"owner/nowhere.*hub"):
        models.resolve("owner/nowhere")


def test_fingerprint_is_of_contents_and_names(make_directory: MakeDirectory) -> None:
    path = make_directory()
    first = models.fingerprint(path)
    assert first.startswith("sha256:")
    assert len(first) == 7 + 64
    (path / "tokenizer.json").write_text('{"other": true}')
    assert models.fingerprint(path) == first
    one, two = sorted(path.glob("*.safetensors"))
    one.write_bytes(b"two")
    two.write_bytes(b"one")
    swapped = models.fingerprint(path)
    one.write_bytes(b"one")
    two.write_bytes(b"two")
    assert models.fingerprint(path) == first != swapped
    assert models.fingerprint(make_directory(hidden_size=64)) not in (first, swapped)
