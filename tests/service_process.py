"""`errata up` as a process of its own: started, asked, stopped or killed with all it started."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from service.client import Client


class ServiceProcess:
    """One run of `errata up` on `data_dir`; `client` talks to it."""

    def __init__(self, data_dir: Path, **environment: str) -> None:
        self.data_dir = data_dir
        self._log = data_dir.with_suffix(".log")
        command = [sys.executable, "-m", "service.cli", "up", "--json", "--port", str(free_port())]
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*command, "--data-dir", str(data_dir)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **environment},
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"errata up did not start:\n{self._log.read_text()}"
        self.client = Client(json.loads(line)["url"])

    def processes(self) -> list[psutil.Process]:
        """The service and everything it started, the database's daemon included."""
        own = psutil.Process(self._process.pid)
        postgres = str(self.data_dir / "postgres")
        daemons = [p for p in psutil.process_iter() if postgres in command_line(p)]
        families = [member for p in (own, *daemons) for member in (p, *p.children(recursive=True))]
        return list(dict.fromkeys(families))

    def actor(self, name: str) -> psutil.Process:
        """The process of (one replica of) a Serve deployment."""
        return self.actors(name)[0]

    def actors(self, name: str) -> list[psutil.Process]:
        """The processes of a Serve deployment's replicas."""
        title = f"ServeReplica:errata:{name}"
        return [p for p in self.processes() if title in "".join(command_line(p)[:1])]

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        self._process.send_signal(signal.SIGINT)
        return self._end()

    def kill_everything(self) -> None:
        """kill -9 of every process at once."""
        doomed = self.processes()
        for process in doomed:
            process.send_signal(signal.SIGSTOP)
        for process in doomed:
            process.kill()
        psutil.wait_procs(doomed, timeout=30)
        self._end()

    def _end(self) -> int:
        assert self._process.stdout is not None
        self._process.stdout.close()
        self.client.close()
        return self._process.wait(timeout=60)


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
