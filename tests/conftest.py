"""A real PostgreSQL for the whole run, and a migrated database of its own for each test."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import psycopg
import pytest

from service.store.database import Database
from service.store.embedded import EmbeddedPostgres
from service.store.migrate import upgrade

_numbers = count(1)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """An empty server's URL; tests take `database_url`."""
    # Not pytest's directory: PostgreSQL's own account must pass through its parents.
    directory = Path(tempfile.mkdtemp(prefix="errata-"))
    server = EmbeddedPostgres(directory)
    try:
        url = server.start()
        with psycopg.connect(url, autocommit=True) as conn:
            # Nothing outlives the run, and a database for each test is a hundred of them.
            conn.execute("ALTER SYSTEM SET fsync = off")
            conn.execute("SELECT pg_reload_conf()")
        yield url
    finally:
        server.stop()
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def template(postgres_url: str) -> str:
    """The name of a migrated database that others are copied from."""
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute("CREATE DATABASE template_errata")
    upgrade(of_database(postgres_url, "template_errata"))
    return "template_errata"


@pytest.fixture
def database_url(postgres_url: str, template: str) -> Iterator[str]:
    """A migrated database that no other test sees."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield of_database(postgres_url, name)
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    connected = Database(database_url)
    yield connected
    await connected.dispose()


def of_database(server_url: str, name: str) -> str:
    """`server_url` (of the embedded server) with another database."""
    return server_url.replace("/postgres?", f"/{name}?", 1)
