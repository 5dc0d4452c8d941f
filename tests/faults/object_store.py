"""An S3 server for tests, moto's, as a process of its own; objects are written and read by HTTP."""

import socket
import subprocess
import sys
from typing import Self

import httpx

from tests.service_process import free_port

BUCKET = "errata"


class ObjectStore:
    """Holds one bucket, in memory, for as long as it runs."""

    def __init__(self) -> None:
        self.address = ("127.0.0.1", free_port())

    def __enter__(self) -> Self:
        host, port = self.address
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not self._listens():
            assert self._process.poll() is None, "moto did not start"
        # Any signature will do, but what clients have signed is not shown to who signs nothing.
        self._http = httpx.Client(
            base_url=f"http://{host}:{port}/{BUCKET}",
            headers={"Authorization": "AWS test:test"},
            timeout=30,
        )
        self._http.put("").raise_for_status()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        self._process.kill()
        self._process.wait()

    def get(self, key: str) -> bytes:
        return self._http.get(f"/{key}").raise_for_status().content

    def put(self, key: str, content: bytes) -> None:
        self._http.put(f"/{key}", content=content).raise_for_status()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(self.address) == 0
