"""A Ray cluster of machines: `ray start` on each, started again whenever it ends.

That is what Kubernetes does with the container of a Ray node. Knows nothing of the service.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import psutil

from tests.cluster.redis import PASSWORD
from tests.cluster.rig import Machine, Network
from tests.dashboard import AUTHENTICATION, PROGRAMS, Dashboard
from tests.faults.site import until
from tests.service_process import command_line

GCS_PORT = 6379
DASHBOARD_PORT = 8265
OBJECT_STORE_BYTES = 150_000_000

_SETTINGS = (Path(__file__).parents[2] / "k8s" / "base" / "settings.env").read_text()
LOST = dict(re.findall(r"^(RAY_(?:SERVE|grpc|health)\w+)=(.+)$", _SETTINGS, re.MULTILINE))
"""How queries pass from node to node, and when one is given up; as on Kubernetes."""
LEAN = {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
"""No worker processes before there is work for them."""


class Node:
    """A machine that runs Ray; the head, unless it is given the head's name to join."""

    def __init__(
        self,
        machine: Machine,
        environment: Mapping[str, str],
        log: Path,
        *,
        cpus: int = 0,
        head: str | None = None,
    ) -> None:
        self.machine = machine
        self.environment = {
            **LOST,
            **LEAN,
            **AUTHENTICATION,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(machine.directory),
            "TMPDIR": str(machine.directory),
            "HOME": str(machine.directory),
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self._log = log
        self._arguments = [
            f"--num-cpus={cpus}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--include-log-monitor=false",
            "--block",
            *(_as_head() if head is None else [f"--address={head}:{GCS_PORT}"]),
        ]

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        self.crash()

    @property
    def address(self) -> str:
        return self.machine.address

    def start(self) -> None:
        """Ray, on the booted machine; returns at once."""
        own = f"--node-ip-address={self.address}"
        once = shlex.join([str(PROGRAMS / "ray"), "start", own, *self._arguments])
        with self._log.open("a") as log:
            self._supervisor = subprocess.Popen(
                self.machine.command(["sh", "-c", f"while :; do {once}; sleep 1; done"]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
            )

    def crash(self) -> None:
        """The whole machine, at once."""
        self.machine.crash()
        self._supervisor.wait(30)

    def restart(self) -> None:
        """A new machine, with the same address unless that has moved."""
        self.machine.boot()
        self.start()

    def run(self, *arguments: str, timeout_s: float = 60) -> str:
        """Output of a program, with this environment and cluster, on this node."""
        environment = {**self.environment, "RAY_ADDRESS": "auto"}
        return self.machine.run(arguments, environment, timeout_s)

    def processes(self, title: str) -> list[psutil.Process]:
        """Those on this node whose command line begins with `title`."""
        every = self.machine.processes()
        return [one for one in every if "".join(command_line(one)[:1]).startswith(title)]


class RayCluster:
    """Nodes named after `name`: a head that offers `head_cpus`, and a worker for each of the rest.

    Each has a machine of its own, with `directory` to itself; their logs are beside that.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        directory: Path,
        environment: Mapping[str, str],
        head_cpus: int = 0,
        worker_cpus: Sequence[int] = (),
    ) -> None:
        self._network = network
        self._head = f"{name}-head"

        def node(role: str, cpus: int, joins: str | None) -> Node:
            machine = Machine(network, directory, network.address())
            log = directory.with_name(f"{name}-{role}.log")
            return Node(machine, environment, log, cpus=cpus, head=joins)

        self.head = node("head", head_cpus, None)
        self.workers = [node(f"{n}", cpus, self._head) for n, cpus in enumerate(worker_cpus, 1)]

    def __enter__(self) -> Self:
        """Returns once every node has joined."""
        with ExitStack() as stack:
            self._meet_head()
            stack.callback(lambda: self.dashboard.close())
            stack.enter_context(self.head)
            until(lambda: self.dashboard.nodes() == 1)
            for node in self.workers:
                stack.enter_context(node)
            until(lambda: self.dashboard.nodes() == len(self.nodes))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def replace_head(self) -> None:
        """As Kubernetes does with a pod: its machine dies, another one takes the name."""
        self.head.crash()
        self.head.machine.move()
        self.dashboard.close()
        self._meet_head()
        self.head.restart()

    def _meet_head(self) -> None:
        self._network.name(self._head, self.head.address)
        self.dashboard = Dashboard(f"http://{self.head.address}:{DASHBOARD_PORT}")

    @property
    def nodes(self) -> list[Node]:
        return [self.head, *self.workers]


def _as_head() -> list[str]:
    return [
        "--head",
        "--no-monitor",
        f"--port={GCS_PORT}",
        "--dashboard-host=0.0.0.0",
        f"--dashboard-port={DASHBOARD_PORT}",
        f"--redis-password={PASSWORD}",
    ]
