"""A PostgreSQL server that other machines reach by TCP, as a service on a cluster needs.

Not a proxy before the embedded one, which has no TCP: the server must notice by itself that a
client was cut off.
"""

import signal
import subprocess
from pathlib import Path
from typing import Self

import psutil
import psycopg

from service.store.embedded import EmbeddedPostgres

PORT = 5432
GUARDED = "guarded"
"""A role that must give a password."""


class Postgres:
    """Listens at `host` for who is in `network`, and trusts them, but for `GUARDED`.

    Its data is in `directory`.
    """

    def __init__(self, directory: Path, host: str, network: str) -> None:
        self._directory = directory
        self._cluster = directory / "postgres"
        self._host = host
        self._network = network
        self.url = self.url_of("postgres")

    def __enter__(self) -> Self:
        program, user, group = self._create()
        self._process = subprocess.Popen(
            [program, "-D", str(self._cluster), "-h", self._host, "-p", str(PORT), "-k", ""],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=user,
            group=group,
            extra_groups=[],
        )
        while not self._answers():
            assert self._process.poll() is None, "PostgreSQL did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def url_of(self, user: str) -> str:
        """`user` may have a password behind a colon."""
        return f"postgresql://{user}@{self._host}:{PORT}/postgres"

    def _create(self) -> tuple[str, int, int]:
        """The data, by the embedded server, and which program ran it as whom."""
        embedded = EmbeddedPostgres(self._directory)
        url = embedded.start()
        try:
            with psycopg.connect(url) as conn:
                conn.execute(f"CREATE ROLE {GUARDED} LOGIN PASSWORD 'right'")
                server = psutil.Process(conn.info.backend_pid).parent()
            assert server is not None
            program, user, group = server.exe(), server.uids().real, server.gids().real
        finally:
            embedded.stop()
        with (self._cluster / "pg_hba.conf").open("a") as access:
            access.write(f"host all {GUARDED} {self._network} scram-sha-256\n")
            access.write(f"host all all {self._network} trust\n")
        return program, user, group

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url).close()
        except psycopg.OperationalError:
            return False
        return True
