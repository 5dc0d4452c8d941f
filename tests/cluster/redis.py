"""A Redis server for tests: what Ray's head keeps across its restarts."""

import socket
import subprocess
from pathlib import Path
from typing import Self

PASSWORD = "errata"


class Redis:
    """Listens on a free port of `host`, keeps what it knows in memory, for as long as it runs."""

    def __init__(self, host: str, directory: Path) -> None:
        with socket.create_server((host, 0)) as probe:
            self.address: tuple[str, int] = (host, probe.getsockname()[1])
        self._directory = directory

    def __enter__(self) -> Self:
        host, port = self.address
        options = ["--bind", host, "--port", str(port), "--requirepass", PASSWORD, "--save", ""]
        self._process = subprocess.Popen(
            ["redis-server", *options, "--dir", str(self._directory)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        said = iter(self._process.stdout.readline, "")
        assert any("Ready to accept connections" in line for line in said), "redis did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()
