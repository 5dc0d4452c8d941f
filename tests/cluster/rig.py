"""Machines made of Linux namespaces: each with an address, processes and files of its own.

Knows nothing of Ray or of the service. Needs root. A machine's processes, interface and files end
with its first process; the kernel ends that with the process that made it.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Self

import psutil

PROGRAMS = ("ip", "bridge", "unshare", "nsenter", "setpriv")
_DISABLED, _FORWARDING = "0", "3"
"""States of a bridge's port, see bridge(8)."""

_BOOT = """
mount -t tmpfs tmpfs "$1"
mount -t tmpfs tmpfs /dev/shm
hostname "$2"
mount --bind "$3" /etc/hosts
echo booted
exec sleep infinity
"""
"""The first process. The host's name is that of its address, as in a pod, not of the loopback."""

_BRIDGE = "02:00:00:00:00:01"
_addresses = count(2)


class Network:
    """A bridge; the host has the first and the last address of its network, machines the others.

    The network is of 198.18.0.0/15, which is for such tests (RFC 2544), and the bridge is named
    after this process, so that two runs on one machine keep out of each other's way. All machines
    know the same names, from the moment that `name` gives one.
    """

    def __init__(self) -> None:
        self.bridge = f"errata{os.getpid()}"
        self._prefix = _unused_prefix()
        self.host, self.other_host = f"{self._prefix}.1", f"{self._prefix}.254"
        self.range = f"{self._prefix}.0/24"
        self._names = {"localhost": "127.0.0.1"}

    def __enter__(self) -> Self:
        descriptor, hosts = tempfile.mkstemp(prefix="errata-", suffix=".hosts")
        os.close(descriptor)
        self.hosts = Path(hosts)
        # Without an address of its own it has that of a port, and another when a machine goes: the
        # others would look for the host where it was.
        _ip("link", "add", self.bridge, "address", _BRIDGE, "type", "bridge")
        for address in (self.host, self.other_host):
            _ip("address", "add", f"{address}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        _ip("link", "delete", self.bridge)
        self.hosts.unlink()

    def name(self, name: str, address: str) -> None:
        """From now on `name` is that of `address`, and of no other."""
        self._names[name] = address
        # In place: the machines have this file mounted. And never empty.
        with self.hosts.open("r+") as file:
            file.write("".join(f"{one} {name}\n" for name, one in self._names.items()))
            file.truncate()

    def address(self) -> str:
        """One that no other machine has had."""
        return f"{self._prefix}.{next(_addresses)}"


class Machine:
    """Private to it: network, name, processes, `/dev/shm`, and what is at `directory`.

    Every machine sees its own, empty, directory at that path.
    """

    def __init__(self, network: Network, directory: Path, address: str) -> None:
        self.address = address
        self.directory = directory
        self._network = network
        directory.mkdir(exist_ok=True)

    def __enter__(self) -> Self:
        self.boot()
        return self

    def __exit__(self, *_: object) -> None:
        self.crash()

    def boot(self) -> None:
        """A new machine with this address, its directory empty."""
        self._port = f"er{os.getpid() % 100_000}.{self.address.rpartition('.')[2]}"
        self._network.name(self._port, self.address)
        own = ["--net", "--mount", "--pid", "--uts", "--propagation", "private", "--mount-proc"]
        unshare = ["unshare", *own, "--fork", "--kill-child"]
        first = ["sh", "-ec", _BOOT, "sh", self.directory, self._port, self._network.hosts]
        self._parent = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *unshare, *map(str, first)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._parent.stdout is not None
        assert self._parent.stdout.readline() == "booted\n"
        children = Path(f"/proc/{self._parent.pid}/task/{self._parent.pid}/children")
        self._first = int(children.read_text())
        _ip("link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", self._first)
        _ip("link", "set", self._port, "master", self._network.bridge, "up")
        for command in (
            "ip link set lo up",
            f"ip address add {self.address}/24 dev eth0",
            "ip link set eth0 up",
        ):
            self.run(command.split())

    def move(self) -> None:
        """The next one to boot has another address."""
        self.address = self._network.address()

    def crash(self) -> None:
        """kill -9 of every process at once; the directory is gone."""
        self._parent.kill()
        self._parent.communicate()
        # Its network may stay a while, for data that nobody takes any more.
        subprocess.run(["ip", "link", "delete", self._port], check=False, stderr=subprocess.DEVNULL)

    def cut_off(self) -> None:
        """From now on nothing passes between this machine and the others, without a word."""
        self._set_port(_DISABLED)

    def reconnect(self) -> None:
        self._set_port(_FORWARDING)

    @contextmanager
    def without_route(self, address: str) -> Iterator[None]:
        """For as long as the block lasts this machine cannot send there, and is told so."""
        self.run(["ip", "route", "add", "unreachable", address])
        try:
            yield
        finally:
            self.run(["ip", "route", "delete", "unreachable", address])

    @contextmanager
    def with_file(self, path: Path, content: str) -> Iterator[None]:
        """For as long as the block lasts this machine, and none else, sees `content` at `path`."""
        other = self.directory / path.name
        self.run(["sh", "-ec", 'printf %s "$1" > "$2"', "sh", content, str(other)])
        self.run(["mount", "--bind", str(other), str(path)])
        try:
            yield
        finally:
            self.run(["umount", str(path)])

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What to execute for `arguments` to run on this machine."""
        entered = ["--net", "--mount", "--pid", "--uts"]
        return ["nsenter", "--target", str(self._first), *entered, *arguments]

    def processes(self) -> list[psutil.Process]:
        """All that run on this machine."""
        own = _namespace(self._first)
        return [one for one in psutil.process_iter() if _namespace(one.pid) == own]

    def run(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 60,
    ) -> str:
        """The command's output; `CalledProcessError` if it fails."""
        done = subprocess.run(
            self.command(arguments),
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            timeout=timeout_s,
        )
        return done.stdout

    def _set_port(self, state: str) -> None:
        subprocess.run(["bridge", "link", "set", "dev", self._port, "state", state], check=True)


@contextmanager
def cut_off(machine: Machine) -> Iterator[None]:
    """For as long as the block lasts."""
    machine.cut_off()
    try:
        yield
    finally:
        machine.reconnect()


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except (FileNotFoundError, PermissionError):
        return None  # It has ended, or is none of ours.


def _ip(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True)


def _unused_prefix() -> str:
    """The first three bytes of a network that no interface here has an address of."""
    shown = ["ip", "-4", "-oneline", "address"]
    used = subprocess.run(shown, check=True, capture_output=True, text=True).stdout
    start = os.getpid() % 256
    candidates = (f"198.18.{(start + step) % 256}" for step in range(256))
    return next(prefix for prefix in candidates if f" {prefix}." not in used)
