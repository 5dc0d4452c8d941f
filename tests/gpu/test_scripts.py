"""The measurements for a GPU, tiny and on the CPU: they run to their end and keep their figures."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu import seventy_two, speed

SPEED = "--shape tiny --edits 12 --batch-size 6 --epochs 2 --layer 3 --device cpu"
SEVENTY_TWO = "--scale 0.016 --layers 5 --edits 8 --batch-size 4 --epochs 2 --device cpu"

# Runs modules as `python -m` does, one after the other, where there is no Ray, which they do not
# need; nor what takes long to import and is not used.
RUN = """
import os, runpy, sys
from workers.imports import leave_out_unused
leave_out_unused()
sys.modules["ray"] = None
os.environ["TORCHDYNAMO_DISABLE"] = "1"
for command in sys.argv[1:]:
    module, *sys.argv[1:] = command.split()
    runpy.run_module(module, run_name="__main__")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both programs kept."""
    folder = tmp_path_factory.mktemp("figures")
    files = [folder / "speed.json", folder / "seventy_two.json"]
    commands = [
        f"tests.gpu.speed {SPEED} --json {files[0]}",
        f"tests.gpu.seventy_two {SEVENTY_TWO} --json {files[1]}",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", RUN, *commands],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        # Without a compiler, as in the images: no operation of DeepSpeed's is built when it runs.
        env={**os.environ, "PATH": ""},
    )
    assert ended.returncode == 0, ended.stderr
    kept: list[dict[str, Any]] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for report in kept:
        assert report["title"].split(",")[0] in " ".join(ended.stdout.split())
    return kept


def by_name(report: dict[str, Any]) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in report["figures"]}


def test_speed(found: list[dict[str, Any]]) -> None:
    figures = by_name(found[0])
    ratio = figures["plain, float32: epoch"] / figures["ours: epoch"]
    assert figures["speed per epoch over plain, float32"] == pytest.approx(ratio)
    assert figures["epoch 2: loss against plain, float32"] < 2**-8
    losses = found[0]["details"]["batch losses"]
    assert {name: len(side) for name, side in losses.items()} == dict.fromkeys(losses, 4)


def test_seventy_two(found: list[dict[str, Any]]) -> None:
    figures, details = by_name(found[1]), found[1]["details"]
    held = figures["suffix weights: held"]
    assert held == pytest.approx(figures["suffix weights: planned"])
    assert details["plan"]["prefix_layers"] == 1
    assert figures["edit-epoch"] > 0
    first, last = details["epoch losses"]
    assert last < first


@pytest.mark.parametrize("program", [speed, seventy_two])
def test_no_gpu(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"sees no GPU.*--device cpu"):
        program.main([])


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (speed.main, "--shape tiny --layer 6 --device cpu", "layers 0 to 5"),
        (seventy_two.main, "--gpu-memory 80 --device cpu", "would fit with"),
    ],
)
def test_what_cannot_be(
    main: Callable[[list[str]], None],
    arguments: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert message in f"{ended.value} {capsys.readouterr().err}"
