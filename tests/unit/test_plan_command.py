"""`errata plan` as it is typed: what it prints, and what it says of bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from deploy.plans.__main__ import CONFIG as QWEN_72B
from service.commands.plan import plan as command
from workers.errors import UnsupportedModel, WorkersError
from workers.plan import Plan


@pytest.fixture
def run() -> Callable[..., Any]:
    """The command with its arguments, for Qwen2.5-72B unless they begin with another model."""
    app = typer.Typer()
    app.command()(command)

    def invoke(*arguments: str, model: str = str(QWEN_72B)) -> Any:
        return CliRunner().invoke(app, [model, *arguments])

    return invoke


def test_the_command_prints_a_plan(run: Callable[..., Any]) -> None:
    result = run("--gpus", "8", "--gpu-memory", "80", "--edits", "10000", "--format", "raw")
    assert result.exit_code == 0
    for said in ("72.7 billion", "10,000 edits, each as raw", "frozen suffix weights", "It fits: "):
        assert said in result.output


def test_the_command_prints_json_and_fails_if_it_does_not_fit(run: Callable[..., Any]) -> None:
    result = run("--gpus", "1", "--gpu-memory", "80", "--epochs", "3", "--json")
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert Plan.model_validate(printed) == Plan.model_validate_json(result.stdout)
    assert (printed["fits"], printed["hparams"]["max_epochs"]) == (False, 3)
    assert "It would fit with: " in run("--gpus", "1", "--gpu-memory", "80").output


def test_the_command_takes_a_directory_without_weights(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(QWEN_72B.read_text())
    result = run("--gpus", "8", "--gpu-memory", "80", "--json", model=str(tmp_path))
    assert json.loads(result.stdout)["tuned"] == ["model.layers.19.mlp.down_proj.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus: 0 is wrong"),
        (["--nodes", "0"], "--nodes: 0 is wrong"),
        (["--gpu-memory", "nan"], "--gpu-memory: nan is wrong"),
        (["--gpu-memory", "-80"], "--gpu-memory: -80.0 is wrong"),
        (["--efficiency", "1.5"], "--efficiency: 1.5 is wrong"),
        (["--edits", "0"], "--edits: 0 is wrong"),
        (["--epochs", "0"], "hparams.max_epochs: 0 is wrong"),
        (["--offload", "tape"], "--offload: 'tape' is wrong"),
        (["--format", "poem"], "'poem' is wrong"),
        (["--parameters", "model.layers.80"], "the model has no 'model.layers.80'; close to it"),
    ],
)
def test_bad_options_are_named(run: Callable[..., Any], arguments: list[str], message: str) -> None:
    result = run("--gpus", "8", "--gpu-memory", "80", *arguments)
    assert isinstance(result.exception, ValueError | WorkersError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_hub_id_that_is_cached_without_weights(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached, revision = tmp_path / "models--owner--big", "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    (cached / "snapshots" / revision).mkdir(parents=True)
    (cached / "snapshots" / revision / "config.json").write_text(QWEN_72B.read_text())
    arguments = ("--gpus", "8", "--gpu-memory", "80", "--json")
    assert json.loads(run(*arguments, model="owner/big").stdout)["layers"] == 80
    missing = run(*arguments, model="owner/other")
    assert "'owner/other': neither a directory nor to be had" in str(missing.exception)


@pytest.mark.parametrize("model", ["/nowhere", "/nowhere/config.json", "nowhere"])
def test_a_model_that_is_not_there(run: Callable[..., Any], model: str) -> None:
    result = run("--gpus", "8", "--gpu-memory", "80", model=model)
    assert isinstance(result.exception, UnsupportedModel)
    assert f"{model!r}: no such directory or file" in str(result.exception)


def test_a_directory_without_a_config(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("--gpus", "8", "--gpu-memory", "80", model=str(tmp_path))
    assert f"{tmp_path}/config.json cannot be read" in str(result.exception)


def test_planning_needs_no_torch() -> None:
    code = "import sys; import service.commands.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
