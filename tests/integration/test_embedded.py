"""The embedded server keeps what was acknowledged, whatever happens to it or to its owner."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from sqlalchemy import text

from service.api.admission import Admission, Admitted
from service.edits import NewEdit
from service.errors import ConfigurationError, Unavailable
from service.store import edits, versions
from service.store.database import Database
from service.store.embedded import EmbeddedPostgres
from service.store.migrate import upgrade

pytestmark = pytest.mark.anyio


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not pytest's own: PostgreSQL's account must pass through its parents."""
    made = Path(tempfile.mkdtemp(prefix="errata-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def server(directory: Path) -> Iterator[EmbeddedPostgres]:
    made = EmbeddedPostgres(directory / "data")
    yield made
    made.stop()


def postmaster(directory: Path) -> psutil.Process:
    lines = (directory / "data" / "postgres" / "postmaster.pid").read_text().splitlines()
    return psutil.Process(int(lines[0]))


def kill(process: psutil.Process) -> None:
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)


async def store(url: str, prompt: str) -> str:
    database = Database(url)
    try:
        async with database.transaction() as conn:
            (stored,) = await edits.add(conn, [NewEdit(prompt=prompt, target="target")])
    finally:
        await database.dispose()
    return stored.id


async def stored_ids(url: str) -> set[str]:
    database = Database(url)
    try:
        async with database.transaction() as conn:
            return {edit.id for edit in (await edits.page(conn))[0]}
    finally:
        await database.dispose()


async def test_data_survives_a_restart_and_kill_9(
    server: EmbeddedPostgres, directory: Path
) -> None:
    url = server.start()
    upgrade(url)
    ids = {await store(url, "before a restart")}
    server.stop()
    server.stop()
    with pytest.raises(Unavailable, match="cannot be reached"):
        await stored_ids(url)
    url = server.start()
    ids.add(await store(url, "before kill -9"))
    kill(postmaster(directory))
    assert server.start() == url
    upgrade(url)
    assert await stored_ids(url) == ids


async def test_the_servers_death_is_outlived(server: EmbeddedPostgres, directory: Path) -> None:
    url = server.start()
    upgrade(url)
    database = Database(url)
    admission = Admission(database)
    async with database.transaction() as conn:
        await versions.ensure_base(conn, "base")
    await admission.start()

    async def lose_the_server() -> None:
        async with database.transaction() as conn:
            kill(postmaster(directory))
            await edits.page(conn)

    with pytest.raises(Unavailable):
        await lose_the_server()
    assert await admission.resolve("errata") == Admitted("v0", 1)
    assert await admission.resolve("errata@base") == Admitted("v0", 1)
    with pytest.raises(Unavailable):
        await admission.resolve("errata@v1")
    server.start()
    async with database.transaction() as conn:
        assert await edits.page(conn) == ([], None)
        await conn.execute(text("UPDATE serving SET generation = 7"))
    async with asyncio.timeout(60):
        while (await admission.resolve("errata")).generation != 7:
            await asyncio.sleep(0.01)
    await admission.stop()
    await database.dispose()


def test_a_server_left_behind_by_a_killed_owner_is_adopted(
    server: EmbeddedPostgres, directory: Path
) -> None:
    owner = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sys, pathlib, service.store.embedded as e;"
            "e.EmbeddedPostgres(pathlib.Path(sys.argv[1])).start(); os.kill(os.getpid(), 9)",
            str(directory / "data"),
        ],
        check=False,
    )
    assert owner.returncode == -9
    left = postmaster(directory)
    url = server.start()
    assert postmaster(directory) == left
    psycopg.connect(url).close()
    server.stop()
    assert not left.is_running()


def test_a_stale_pid_file_that_names_another_process(
    server: EmbeddedPostgres, directory: Path
) -> None:
    server.start()
    pid_file = directory / "data" / "postgres" / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    kill(postmaster(directory))
    pid_file.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
    psycopg.connect(server.start()).close()


def test_an_interrupted_initdb_is_done_again(server: EmbeddedPostgres, directory: Path) -> None:
    half = directory / "data" / "postgres.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    psycopg.connect(server.start()).close()


def test_only_its_own_account_can_reach_it(server: EmbeddedPostgres, directory: Path) -> None:
    with psycopg.connect(server.start()) as conn:
        found = conn.execute(
            "SELECT name, setting FROM pg_settings WHERE name IN"
            " ('fsync', 'synchronous_commit', 'full_page_writes', 'listen_addresses')"
        )
        settings: dict[str, str] = dict(found.fetchall())
    assert settings == {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "listen_addresses": "",
    }
    assert (directory / "data" / "postgres").stat().st_mode & 0o777 == 0o700


def test_a_path_too_long_for_a_socket(directory: Path) -> None:
    server = EmbeddedPostgres(directory / ("long" * 30))
    try:
        url = server.start()
        psycopg.connect(url).close()
    finally:
        server.stop()
    assert not Path(url.partition("host=")[2]).exists()


def test_a_directory_with_odd_characters(directory: Path) -> None:
    server = EmbeddedPostgres(directory / "a b%20c'd?&,é")
    try:
        psycopg.connect(server.start()).close()
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_data_dir_that_cannot_be_used_is_named(directory: Path, name: str) -> None:
    (directory / "file").write_text("")
    server = EmbeddedPostgres(directory / name)
    with pytest.raises(ConfigurationError, match=f"data_dir .*{name}"):
        server.start()
    server.stop()


def test_data_of_another_major_version_is_refused(directory: Path) -> None:
    (directory / "postgres").mkdir()
    (directory / "postgres" / "PG_VERSION").write_text("16\n")
    with pytest.raises(ConfigurationError, match="written by PostgreSQL 16"):
        EmbeddedPostgres(directory).start()
