"""What must hold before the service is deployed on a Ray cluster.

Looks at each node of it. Whatever is wrong is said with the setting's name and where to set it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.build import require_build, source_digest
from service.errors import ConfigurationError, ErrataError, NotYet
from service.settings import Settings
from service.store.database import parse_url, reach
from workers import models
from workers.errors import IncompleteModel, WorkersError
from workers.folders import Folder

log = logging.getLogger(__name__)

NETWORK_S = 300.0
"""A database, a version store and nodes that are not reached are waited for so long at most."""
NODE_S = 60.0
"""A node that has not answered within this time is taken for unable to."""
RETRY_S = 1.0
PROBES, PROBE = "probes", "probe"
"""Where the version store is tried out: a file in a folder that each attempt has to itself."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    about: str
    passed: bool
    detail: str
    """What was found, or what is wrong and how to mend it."""


@dataclass(frozen=True)
class Node:
    id: str
    address: str
    cpus: float
    gpus: float


def require(settings: Settings) -> None:
    """Raises a `ConfigurationError` that tells all that is wrong.

    What may still come is waited for.
    """
    _require(examine(settings, settings.cluster_wait_s))


def require_nodes(settings: Settings) -> None:
    """As `require`, of what each node of a cluster must have that only trains."""
    if len(alive_nodes()) > 1:
        _require(_nodes(settings, min(settings.cluster_wait_s, NETWORK_S)))


def examine(settings: Settings, wait_s: float = 0.0) -> Iterator[Finding]:
    """Everything that can be known beforehand; of the Ray cluster too, if one is connected to.

    What is not there is waited for: the model and GPUs for `wait_s`, the rest for at most
    `NETWORK_S` of it.
    """
    network_s = min(wait_s, NETWORK_S)
    yield _finding("model", lambda: _model(settings), wait_s)
    if not ray.is_initialized():
        yield _finding("database", lambda: _database(settings), network_s)
        yield _finding("version_store", lambda: _store(settings), network_s)
        return
    # First, as it waits for nodes, each of which is then looked at.
    yield _finding("gpus", lambda: _gpus(settings), wait_s)
    yield from _nodes(settings, network_s)


def check_host(host: str, behind_proxy: bool) -> None:
    """Refuses to listen beyond this machine unless a proxy authenticates: nobody else does."""
    if not behind_proxy and host != "localhost" and not _is_loopback(host):
        raise ConfigurationError(
            f"host: {host!r} is not a loopback address, and requests are not authenticated; "
            "use 127.0.0.1, or have a proxy authenticate them and set ERRATA_BEHIND_PROXY=true"
        )


def check_shared(settings: Settings, node_count: int) -> None:
    """Refuses what only one node can reach, on a cluster of several."""
    if node_count < 2:
        return
    wrong = []
    if settings.database_url is None:
        wrong.append(
            f"database_url: none is set, and this Ray cluster has {node_count} nodes; the embedded "
            "PostgreSQL is for one: set ERRATA_DATABASE_URL to a server that all of them reach"
        )
    if settings.version_store is None:
        wrong.append(
            f"version_store: none is set, and this Ray cluster has {node_count} nodes; a folder "
            "under the data directory is for one: set ERRATA_VERSION_STORE to an fsspec URL, or "
            "to a shared folder, that all of them reach"
        )
    if wrong:
        raise ConfigurationError("; ".join(wrong))


def alive_nodes() -> list[Node]:
    """Those of the Ray cluster that is connected to."""
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _require(findings: Iterator[Finding]) -> None:
    wrong = [found.detail for found in findings if not found.passed]
    if wrong:
        raise ConfigurationError("; ".join(wrong))


def _finding(about: str, look: Callable[[], str], wait_s: float = 0.0) -> Finding:
    """Looks again, for so long, at what is not there yet, and says once what is waited for."""
    began, told = time.monotonic(), False
    while True:
        try:
            return Finding(about, True, look())
        except (ErrataError, WorkersError) as error:
            if not isinstance(error, NotYet) or time.monotonic() >= began + wait_s:
                return Finding(about, False, str(error))
            if not told:
                log.warning("waiting for at most %.0f s: %s", wait_s, error)
                told = True
        time.sleep(RETRY_S)


def _nodes(settings: Settings, wait_s: float) -> Iterator[Finding]:
    shared = _finding("settings", lambda: _shared(settings, alive_nodes()))
    yield shared
    if shared.passed:
        yield _finding("database", lambda: _database(settings), wait_s)
        yield _finding("nodes", lambda: _each_node(settings, alive_nodes()), wait_s)


def _model(settings: Settings) -> str:
    """May still be on its way to where it is read from."""
    try:
        return str(models.check(models.resolve(settings.model_path)).path)
    except IncompleteModel as error:
        raise NotYet(
            f"model: {error}; ERRATA_MODEL names it (on Kubernetes a Job from the CronJob "
            "errata-models brings it)"
        ) from error


def _shared(settings: Settings, nodes: list[Node]) -> str:
    if settings.database_url is None:
        raise ConfigurationError(
            "database_url: none is set; a deployed service needs a PostgreSQL of its own: set "
            "ERRATA_DATABASE_URL (on Kubernetes the key `url` of the Secret errata-database). "
            "`errata up` starts an embedded one"
        )
    check_shared(settings, len(nodes))
    return f"{len(nodes)} nodes"


def _database(settings: Settings) -> str:
    """Reached from here."""
    if settings.database_url is None:
        return "embedded, under the data directory"
    asyncio.run(reach(settings.database_url))
    return parse_url(settings.database_url).render_as_string(hide_password=True)


def _store(settings: Settings) -> str:
    """Written and read from here."""
    url = settings.version_store_url
    if settings.version_store is None:
        return f"{url}, under the data directory"
    name = _write(url)
    _read(url, name)
    Folder(url, PROBES).remove_folder(name)
    return url


def _each_node(settings: Settings, nodes: list[Node]) -> str:
    """What one node writes into the version store, each reads; each reaches the database."""
    url, here = settings.version_store_url, ray.get_runtime_context().get_node_id()
    if not any(node.cpus for node in nodes):
        raise NotYet(
            "the Ray cluster has no node with CPUs yet, only a head that reserves nothing; add one "
            "(on Kubernetes: are the pods of the worker groups pending?)"
        )
    writer = next(node for node in nodes if node.id == here)
    name = _answer(writer, _on(writer, _write, url), url)
    asked = [
        (node, _on(node, _probe, settings, name, source_digest(), node.address)) for node in nodes
    ]
    wrong = [error for node, ref in asked if (error := _failure(node, ref, url))]
    if wrong:
        passing = all(isinstance(error, NotYet) for error in wrong)
        raise (NotYet if passing else ConfigurationError)("; ".join(map(str, wrong)))
    Folder(url, PROBES).remove_folder(name)
    return f"{len(nodes)} of one build reach the database and {url}"


def _probe(settings: Settings, name: str, build: str, address: str) -> None:
    require_build(build, address)
    assert settings.database_url is not None
    asyncio.run(reach(settings.database_url))
    _read(settings.version_store_url, name)


def _on(node: Node, function: Callable[..., Any], *args: Any) -> ray.ObjectRef[Any]:
    strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
    options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}
    return ray.remote(**options)(function).remote(*args)


def _failure(node: Node, ref: ray.ObjectRef[Any], url: str) -> ErrataError | None:
    try:
        _answer(node, ref, url)
    except ErrataError as error:
        return error
    return None


def _answer(node: Node, ref: ray.ObjectRef[Any], url: str) -> Any:
    try:
        return ray.get(ref, timeout=NODE_S)
    except GetTimeoutError as error:
        ray.cancel(ref, force=True)
        raise NotYet(
            f"node {node.address} did not answer within {NODE_S:g} s; does it reach the version "
            f"store {url} (ERRATA_VERSION_STORE)?"
        ) from error
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        passing = isinstance(cause, NotYet) or not isinstance(cause, ErrataError)
        kind = NotYet if passing else ConfigurationError
        raise kind(f"node {node.address}: {cause}") from error


def _write(url: str) -> str:
    name = uuid4().hex
    try:
        folder = Folder(url, PROBES, name)
        folder.make()
        folder.write(PROBE, name.encode())
    except Exception as error:
        raise _unreachable(url, "written", error) from error
    return name


def _read(url: str, name: str) -> None:
    try:
        found = Folder(url, PROBES, name).read(PROBE).decode()
    except Exception as error:
        raise _unreachable(url, "read", error) from error
    if found != name:
        raise ConfigurationError(f"version_store: {url} gave back something else than was written")


def _unreachable(url: str, how: str, error: Exception) -> NotYet:
    """Stores of each kind have errors of their own."""
    reason = str(error).strip().splitlines() or ["no reason given"]
    return NotYet(
        f"version_store: {url} cannot be {how} ({type(error).__name__}: {reason[0]}); set "
        "ERRATA_VERSION_STORE to a store that every node reaches, and its credentials beside it"
    )


def _gpus(settings: Settings) -> str:
    """Nodes may still be joining."""
    if settings.replica_gpus > (most := max(node.gpus for node in alive_nodes())):
        raise NotYet(
            f"replica_gpus: a replica reserves {settings.replica_gpus:g} GPU, but no node of the "
            "Ray cluster has any; add nodes with GPUs (on Kubernetes: are the pods of the GPU "
            "worker group pending? ERRATA_CLUSTER_WAIT_S is how long they are waited for), or set "
            "ERRATA_REPLICA_GPUS=0 to compute on CPUs"
        )
    return f"{settings.replica_gpus:g} a replica, {most:g} on the node with most"
