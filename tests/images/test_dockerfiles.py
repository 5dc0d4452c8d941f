"""The images: what they are made from, who they run as, and that it is all pinned and there."""

import difflib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.images.dockerfile import CHECKOUT, Instruction, arguments, ignored, read, stages

DOCKERFILES = sorted((CHECKOUT / "docker").glob("Dockerfile.*"))
CONSTRAINTS = (CHECKOUT / "constraints.txt").read_text().splitlines()
LOCKED = dict(line.split("==") for line in CONSTRAINTS if "==" in line)
IGNORE = [
    line
    for line in (CHECKOUT / ".dockerignore").read_text().splitlines()
    if line and not line.startswith("#")
]

each_dockerfile = pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)


def runtime(file: Path) -> list[Instruction]:
    return stages(read(file))[-1]


def environment(file: Path) -> dict[str, str]:
    words = [word for one in runtime(file) if one.keyword == "ENV" for word in one.words]
    return dict(word.split("=", 1) for word in words)


def copied(file: Path) -> list[str]:
    """What an image's stages take from the checkout."""
    instructions = [one for one in read(file) if one.keyword == "COPY"]
    return [
        source for one in instructions if "--from=" not in one.value for source in one.words[:-1]
    ]


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert [file.name for file in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    assert hadolint, "make install brings it"
    found = subprocess.run(
        [hadolint, "--no-color", *map(str, DOCKERFILES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_both_differ_in_torch_s_build_only() -> None:
    cpu, cuda = [re.sub(r"(?m)^#.*\n", "", file.read_text()).splitlines() for file in DOCKERFILES]
    differing = [
        line
        for line in difflib.unified_diff(cpu, cuda, n=0, lineterm="")
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert differing == [
        "-ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu",
        "+ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130",
        "+    NVIDIA_REQUIRE_CUDA=cuda>=13.0 \\",
    ]


@each_dockerfile
def test_the_base_has_the_ray_and_the_python_that_are_installed(file: Path) -> None:
    tag = arguments(read(file))["RAY_TAG"]
    assert tag == f"{LOCKED['ray']}-py311-cpu"
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert arguments(read(file))["VERSION"] == project["version"]
    bases = [stage[0].words[0] for stage in stages(read(file))]
    assert set(bases) == {"rayproject/ray:${RAY_TAG}"}


@each_dockerfile
def test_what_is_copied_is_there_and_is_sent(file: Path) -> None:
    for source in copied(file):
        path = CHECKOUT / source
        assert path.exists(), source
        assert not ignored(source, IGNORE), source
        below = [p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        names = [str(p.relative_to(CHECKOUT)) for p in below if p.name != ".env"]
        assert [name for name in names if ignored(name, IGNORE)] == []


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".errata/postgres/PG_VERSION",
        ".git/config",
        ".venv/bin/python",
        "deploy/.env",
        "docker/.env",
        "docker/settings.env",
        "service/__pycache__/app.cpython-311.pyc",
        "tests/conftest.py",
    ],
)
def test_what_is_no_part_of_an_image_is_not_sent(name: str) -> None:
    assert ignored(name, IGNORE)


@each_dockerfile
def test_dependencies_come_before_any_source(file: Path) -> None:
    first = stages(read(file))[0]
    sources = [word for one in first if one.keyword == "COPY" for word in one.words[:-1]]
    assert sources == ["constraints.txt", "pyproject.toml", "docker/install.sh"]
    keywords = [one.keyword for one in runtime(file)]
    last_copy = len(keywords) - 1 - keywords[::-1].index("COPY")
    assert "RUN" not in keywords[last_copy:]
    assert [one.words for one in runtime(file) if one.keyword == "COPY"][-1] == ["service"] * 2


@each_dockerfile
def test_runs_as_an_ordinary_user_who_cannot_become_another(file: Path) -> None:
    users = [one.value for one in runtime(file) if one.keyword == "USER"]
    assert users[-1] == "1000:100"
    runs = " ".join(one.value for one in runtime(file) if one.keyword == "RUN")
    assert "rm -f /usr/bin/sudo" in runs


@each_dockerfile
def test_signals_reach_the_service_itself(file: Path) -> None:
    """The command is a list: no shell stands between."""
    commands = [one.value for one in runtime(file) if one.keyword in ("CMD", "ENTRYPOINT")]
    assert commands == ['["errata", "up"]']


@each_dockerfile
def test_no_secret_is_in_an_image(file: Path) -> None:
    declared = [*environment(file), *arguments(read(file))]
    secret = re.compile(r"password|secret|token|key|credential|database_url", re.IGNORECASE)
    assert [name for name in declared if secret.search(name)] == []


@each_dockerfile
def test_what_is_written_is_outside_the_checkout(file: Path) -> None:
    """So that the root file system can be read-only."""
    folders = {
        name: value
        for name, value in environment(file).items()
        if re.search(r"_(DIR|HOME)$|CONFIGDIR$", name)
    }
    assert folders["ERRATA_DATA_DIR"] == "/data"
    assert all(value.startswith(("/data", "/tmp/")) for value in folders.values()), folders
