"""Brings a database to the newest schema; run once, before anything else connects."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from service.store.database import cannot_connect, is_away, parse_url, with_timeouts

MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x45525241  # "ERRA"


def upgrade(url: str) -> None:
    """Apply every migration that `url` lacks; callers at the same time wait for each other.

    `ConfigurationError` if the database cannot be reached or refuses the credentials. Blocks.
    """
    parsed = parse_url(url)
    engine = create_engine(with_timeouts(parsed), poolclass=NullPool)
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            command.upgrade(configuration(connection), "head")
    except DBAPIError as error:
        if not is_away(error):
            raise
        raise cannot_connect(parsed, error) from error


def configuration(connection: Connection) -> Config:
    """Alembic's configuration, bound to an open connection."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config
