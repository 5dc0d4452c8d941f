"""The runbooks say what is so: what they name exists."""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from ray.util.metrics import Counter, Gauge, Histogram
from sqlalchemy import text

from service import metrics
from service.cli import app
from service.settings import Settings
from service.store import serving, versions
from service.store.database import Database
from tests.images.commands import (
    blocks,
    command_lines,
    errata_arguments,
    inline,
    parser,
)
from tests.images.dockerfile import CHECKOUT

RUNBOOKS = sorted((CHECKOUT / "deploy" / "runbooks").glob("*.md"))
PAGES = [CHECKOUT / "README.md", CHECKOUT / "deploy" / "README.md", *RUNBOOKS]
PAGES += [page for page in [CHECKOUT / "k8s" / "README.md"] if page.exists()]
CLIENTS = {"ERRATA_API_URL", "ERRATA_API_KEY"}
"""Not of the service, but of the command line's client."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))


def test_there_is_one_for_each_occasion() -> None:
    index = (CHECKOUT / "deploy" / "README.md").read_text()
    names = {"batch-edit-job", "database-lost", "install", "roll-back", "scale", "upgrade"}
    assert {page.stem for page in RUNBOOKS} == names
    assert all(f"](runbooks/{name}.md)" in index for name in names)


@each_page
def test_every_command_is_one_that_errata_takes(page: Path) -> None:
    takes = parser(app)
    given = [errata_arguments(words) for words in command_lines(page)]
    assert [arguments for arguments in given if arguments and not takes(arguments)] == []


def test_a_command_that_errata_does_not_take_is_found() -> None:
    takes = parser(app)
    for line in ("frobnicate", "jobs run --frobnicate", "jobs show", "versions list --limit many"):
        assert not takes(line.split()), line


@each_page
def test_every_setting_exists(page: Path) -> None:
    known = {f"ERRATA_{name.upper()}" for name in Settings.model_fields} | CLIENTS
    assert set(re.findall(r"ERRATA_[A-Z][A-Z_]*[A-Z]", page.read_text())) <= known


def exported() -> Iterator[str]:
    """The names under which Prometheus has the service's metrics."""
    suffixes = {Counter: ["_total"], Gauge: [""], Histogram: ["", "_bucket", "_count", "_sum"]}
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            yield from (f"ray_{metric.info['name']}{end}" for end in suffixes[type(metric)])


@each_page
def test_every_metric_exists(page: Path) -> None:
    named = set(re.findall(r"ray_errata_\w+", page.read_text()))
    assert named <= set(exported())


@cache
def messages() -> list[str]:
    """Every text in the sources, with … for what is filled in."""
    found = []
    for folder in ("service", "workers", "deploy"):
        for file in (CHECKOUT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def quoted(page: Path) -> list[str]:
    """The first column of the tables that are headed `message`."""
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    return [row.split("|")[1].strip(" `") for table in tables for row in table.splitlines()]


@pytest.mark.parametrize("page", RUNBOOKS, ids=lambda page: page.stem)
def test_every_message_is_one_that_is_given(page: Path) -> None:
    assert quoted(page)
    for message in quoted(page):
        pattern = ".*".join(re.escape(piece) for piece in message.split("…"))
        assert any(re.search(pattern, one, re.DOTALL) for one in messages()), message


@each_page
def test_every_link_and_file_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
    given = [word for words in command_lines(page) for word in words]
    files = [word for word in given if re.match(r"(docker|deploy|k8s)/[\w./-]+$", word)]
    made = {"docker/.env", "docker/settings.env"}
    assert [file for file in files if file not in made and not (CHECKOUT / file).exists()] == []


@each_page
def test_every_make_rule_is_there(page: Path) -> None:
    rules = set(re.findall(r"^([a-z][\w-]*):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    made = [words[1] for words in command_lines(page) if words[0] == "make" and len(words) > 1]
    assert set(made) <= rules


@cache
def named_in_kubernetes() -> set[str]:
    """What the manifests name, and what KubeRay, and a StatefulSet, name after that."""
    texts = [file.read_text() for file in (CHECKOUT / "k8s").rglob("*.yaml")]
    named = set(re.findall(r"\berrata[a-z0-9-]*", "\n".join(texts))) | {"errata-serve-svc"}
    return named | {f"{name}-0" for name in named} | {f"data-{name}-0" for name in named}


@each_page
def test_every_object_on_kubernetes_exists(page: Path) -> None:
    for words in command_lines(page):
        if words[0] == "kubectl":
            names = [re.split(r"[/=]", word)[-1] for word in words[1:]]
            mentioned = {name for name in names if re.fullmatch(r"(data-)?errata[a-z0-9-]*", name)}
            assert mentioned <= named_in_kubernetes(), words


@each_page
def test_every_part_of_the_compose_file_exists(page: Path) -> None:
    compose = yaml.safe_load((CHECKOUT / "docker" / "compose.yaml").read_text())
    for words in command_lines(page):
        if words[:2] == ["docker", "compose"] and "exec" in words:
            rest = [word for word in words[words.index("exec") + 1 :] if not word.startswith("-")]
            assert rest[0] in compose["services"], words
        if words[:3] == ["docker", "volume", "rm"]:
            assert words[3].removeprefix(f"{compose['name']}_") in compose["volumes"], words


@each_page
def test_images_have_this_version(page: Path) -> None:
    version = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    texts = [*inline(page), *blocks(page)]
    tags = re.findall(r"\berrata:(\d[\w.-]*)", "\n".join(texts))
    assert set(tags) <= {version, f"{version}-cuda"}


@pytest.mark.anyio
async def test_a_restored_database_goes_on_after_what_the_store_and_the_clients_know(
    database: Database,
) -> None:
    """The runbook's SQL, on a database whose backup is older than its version store."""
    [statements] = blocks(CHECKOUT / "deploy" / "runbooks" / "database-lost.md", "sql")
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "of the base model")
        before = await serving.current(conn)
    async with database.transaction() as conn:
        for statement in filter(str.strip, statements.split(";")):
            await conn.execute(text(statement))
        assert await versions.allocate(conn) == "v43"
        assert (await serving.current(conn)).generation == before.generation + 1_000_000
