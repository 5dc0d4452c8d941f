"""The migrations build the tables that the code declares, once, whoever comes first."""

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect
from sqlalchemy.pool import NullPool

from service.errors import ConfigurationError
from service.store.database import parse_url
from service.store.migrate import configuration, upgrade
from service.store.tables import metadata
from tests.conftest import of_database


def test_migrations_equal_the_tables(database_url: str) -> None:
    engine = create_engine(parse_url(database_url), poolclass=NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_check_constraints_equal_the_tables(postgres_url: str, database_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute("CREATE DATABASE from_metadata")
    declared = create_engine(
        parse_url(of_database(postgres_url, "from_metadata")), poolclass=NullPool
    )
    migrated = create_engine(parse_url(database_url), poolclass=NullPool)
    metadata.create_all(declared)
    with declared.connect() as one, migrated.connect() as other:
        for table in metadata.tables:
            assert inspect(one).get_check_constraints(table) == inspect(
                other
            ).get_check_constraints(table)


def test_upgrade_again_and_all_at_once(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute("CREATE DATABASE at_once")
    url = of_database(postgres_url, "at_once")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(upgrade, [url] * 4))
    upgrade(url)
    with psycopg.connect(url) as conn:
        assert conn.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]


def test_downgrade_leaves_nothing(database_url: str) -> None:
    engine = create_engine(parse_url(database_url), poolclass=NullPool)
    with engine.begin() as connection:
        command.downgrade(configuration(connection), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:s3cret@127.0.0.1:1/db", "127.0.0.1"),
        ("postgresql://me:s3cret@127.0.0.1:port/db", "percent-encoded"),
        ("mysql://me:s3cret@127.0.0.1/db", "needs PostgreSQL"),
        ("s3cret", "not a URL"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        upgrade(url)
    assert "s3cret" not in str(caught.value)


def test_wrong_credentials_are_a_configuration_error(postgres_url: str) -> None:
    url = postgres_url.replace("postgres@", "nobody_here:s3cret@", 1)
    with pytest.raises(ConfigurationError, match="nobody_here") as caught:
        upgrade(url)
    assert "s3cret" not in str(caught.value)
