"""The connection to PostgreSQL: transactions, notifications, and what to say when it is away.

Knows nothing about tables. Every way in raises `Unavailable` when the server cannot be reached,
and none waits for ever for a server that has stopped answering.
"""

import asyncio
import logging
import os
import select
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import psycopg
from psycopg import sql
from psycopg.abc import RV, PQGen
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from service.errors import ConfigurationError, NotYet, Unavailable

_CONNECT = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    # The server must notice, too, that a client was cut off, or its locks would stay: for hours by
    # its own settings. Keepalives tell of a silent one, the last of one that was being answered.
    "options": "-c tcp_keepalives_idle=5 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=2 "
    "-c tcp_user_timeout=15000",
}
ANSWER_S = 8.0
"""A statement that takes longer is given up, its server taken for away."""
CHECK_S = 5.0
"""How often a connection that only listens is asked whether it still is one, and for how long."""
_RECONNECT_S = 0.5
# Classes 08 (connection), 53 (too many of them) and 57 (shutdown, crash, starting up); a deadlock,
# which the server ended on this side.
_AWAY = ("08", "53", "57P", "40P01")
# What a server says to a new connection that it may take later: it starts or ends, or is full.
_PASSING = ("the database system is", "too many clients", "remaining connection slots")

log = logging.getLogger(__name__)


def parse_url(url: str) -> URL:
    """`url` for SQLAlchemy and psycopg 3; `ConfigurationError` unless it names a PostgreSQL."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The parser's own message may quote the password.
        raise ConfigurationError(
            "database_url is not a URL; write it as postgresql://user:password@host:port/database "
            "with special characters in the password percent-encoded"
        ) from None
    if parsed.get_backend_name() != "postgresql":
        raise ConfigurationError(
            f"database_url: {parsed.get_backend_name()!r} is not supported; errata needs PostgreSQL"
        )
    return parsed.set(drivername="postgresql+psycopg")


def with_timeouts(url: URL) -> URL:
    """`url` with libpq's and the server's timeouts, where it does not set them itself."""
    return url.update_query_dict({name: v for name, v in _CONNECT.items() if name not in url.query})


class Connection(psycopg.AsyncConnection[tuple[object, ...]]):
    """Ends itself when the server has not answered within `answer_s`: whoever waits gets an error.

    A server that is frozen, or cut off without a word, takes what is sent and says nothing; the
    driver would wait for ever, and so would its way of cancelling, which asks the server.
    """

    answer_s = ANSWER_S

    async def wait(
        self,
        gen: PQGen[RV],
        interval: float = 0.1,
        timeout: float | None = None,  # noqa: ASYNC109  # the driver's own signature
    ) -> RV:
        """As the driver's own; `timeout` is of those that expect to wait."""
        if timeout is not None:
            return await super().wait(gen, interval, timeout)
        self._watch()
        try:
            return await super().wait(gen, interval)
        finally:
            self._patience.cancel()

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        self._patience = loop.call_later(self.answer_s, self._hang_up)

    def _hang_up(self) -> None:
        answered = select.poll()
        answered.register(self.fileno(), select.POLLIN)
        if answered.poll(0):
            # It is this process that is late.
            self._watch()
            return
        log.warning("no answer from the database within %g s; hanging up", self.answer_s)
        with socket.socket(fileno=os.dup(self.fileno())) as own:
            own.shutdown(socket.SHUT_RDWR)


async def connect(url: URL, answer_s: float) -> Connection:
    """A connection outside any pool, in autocommit mode; `psycopg.OperationalError` if it fails."""
    full = with_timeouts(url)
    given = {**full.translate_connect_args(username="user", database="dbname"), **full.query}
    return await _connect(answer_s, autocommit=True, **given)


async def _connect(answer_s: float, *args: Any, **options: Any) -> Connection:
    conn = await Connection.connect(*args, **options)
    conn.answer_s = answer_s
    return conn


def is_away(error: DBAPIError | psycopg.Error) -> bool:
    """Whether `error` is the server's state, to be waited out, not a statement's own failure."""
    driver = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if not isinstance(driver, psycopg.OperationalError):
        return False
    return driver.sqlstate is None or driver.sqlstate.startswith(_AWAY)


def cannot_connect(url: URL, error: DBAPIError | psycopg.Error) -> ConfigurationError:
    """What to tell whoever started the service; never the password."""
    reason = str(error.orig if isinstance(error, DBAPIError) else error).strip()
    if isinstance(url.password, str) and url.password:
        reason = reason.replace(url.password, "***")
    shown = url.set(drivername="postgresql").render_as_string(hide_password=True)
    return ConfigurationError(
        f"cannot use the database {shown}: {reason}; check ERRATA_DATABASE_URL "
        "and that the server runs"
    )


async def reach(url: str) -> None:
    """Connects once; `ConfigurationError` with the reason if that fails.

    `NotYet` if no server answers, or none that takes connections: it may be starting.
    """
    parsed = parse_url(url)
    try:
        async with await connect(parsed, CHECK_S) as conn:
            await conn.execute("SELECT 1")
    except psycopg.OperationalError as error:
        told = cannot_connect(parsed, error)
        raise told if _is_refusal(error) else NotYet(str(told)) from error


def _is_refusal(error: psycopg.OperationalError) -> bool:
    """Whether a server that is ready refused the connection; libpq gives its words only."""
    said = str(error)
    return "FATAL:" in said and not any(passing in said for passing in _PASSING)


class Database:
    """A pool of connections to one database, bound to the event loop that first uses it."""

    def __init__(self, url: str, *, pool_size: int = 10, answer_s: float = ANSWER_S) -> None:
        """`answer_s` bounds each statement: higher for who runs long ones."""
        self._url = parse_url(url)
        self._engine = create_async_engine(
            with_timeouts(self._url),
            connect_args={"async_creator_fn": partial(_connect, answer_s)},
            pool_pre_ping=True,
            pool_size=pool_size,
            # The same connections again, which have their statements prepared.
            pool_use_lifo=True,
            max_overflow=0,
            pool_timeout=5,
            # Of INSERTs, too: several queries ask how many rows they wrote.
            execution_options={"preserve_rowcount": True},
        )

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction: committed at the end, rolled back on an exception."""
        try:
            async with self._engine.begin() as conn:
                yield conn
        except DBAPIError as error:
            if not is_away(error):
                raise
            raise Unavailable("the database cannot be reached now; try again soon") from error
        except PoolTimeout as error:
            raise Unavailable("the database is busy; try again soon") from error

    async def listen(self, channel: str) -> AsyncGenerator[str]:
        """The payloads sent to `channel`, for ever, on a connection of its own.

        It reconnects by itself; what was sent meanwhile is lost, so poll too.
        """
        while True:
            try:
                async with aclosing(self._listen_once(channel)) as heard:
                    async for payload in heard:
                        yield payload
            except psycopg.OperationalError as error:
                log.warning("not listening on %s: %s; connecting again", channel, error)
            await asyncio.sleep(_RECONNECT_S)

    async def _listen_once(self, channel: str) -> AsyncGenerator[str]:
        async with await connect(self._url, CHECK_S) as conn:
            await conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
            while True:
                async with aclosing(conn.notifies(timeout=CHECK_S)) as notifications:
                    async for notification in notifications:
                        yield notification.payload
                await conn.execute("SELECT 1")

    async def dispose(self) -> None:
        """Close every pooled connection."""
        await self._engine.dispose()
