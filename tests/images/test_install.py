"""`docker/install.sh`, which both images and `make install` run: what it left here is the lock."""

import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.images.dockerfile import CHECKOUT

LINES = (CHECKOUT / "constraints.txt").read_text().splitlines()
LOCKED: dict[str, str] = {
    canonicalize_name(name): version for name, version in (line.split("==") for line in LINES)
}


def needed(name: str, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """The distributions that an installed one requires here, and with which extras."""
    for line in requires(name) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": one}) for one in extras or {""}):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def installed_for(name: str, extras: frozenset[str]) -> set[str]:
    """All that it requires, and what they require, and so on."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, extras)]
    while waiting:
        if (one := waiting.pop()) not in seen:
            seen.add(one)
            waiting += needed(*one)
    return {name for name, _ in seen}


def test_all_that_is_needed_is_installed_as_locked() -> None:
    """The script made this environment, in CI anew each time."""
    names = installed_for("errata", frozenset({"dev"})) - {"errata"}
    assert len(names) > 100
    found = {name: version(name).partition("+")[0] for name in names}
    assert {name: one for name, one in found.items() if LOCKED.get(name) != one} == {}


def test_what_comes_with_torch_for_gpus_is_locked() -> None:
    """It is not installed here; these are needed by several names, or without a version."""
    assert {"cuda-bindings", "cuda-pathfinder", "cuda-toolkit", "nvidia-nvjitlink"} <= set(LOCKED)
    assert {"nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton"} <= set(LOCKED)


def test_the_lock_is_sorted_and_exact() -> None:
    names = [line.split("==")[0] for line in LINES]
    assert names == sorted(names, key=str.lower)
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in LINES)


def test_make_install_runs_the_script() -> None:
    """And nothing else of its own that installs."""
    makefile = (CHECKOUT / "Makefile").read_text()
    assert "docker/install.sh dev" in makefile
    assert "pip install" not in makefile


@pytest.mark.parametrize("extras", ["dev", "s3"])
def test_the_extras_exist(extras: str) -> None:
    assert f"\n{extras} = [" in (CHECKOUT / "pyproject.toml").read_text()


def test_a_failing_step_fails_the_script(tmp_path: Path) -> None:
    """With the program that is to make the environment away, nothing is installed anywhere."""
    found = subprocess.run(
        [CHECKOUT / "docker" / "install.sh"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "no-such-python", "VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 127
    assert "no-such-python" in found.stderr
    assert not (tmp_path / "venv").exists()
