"""A service on a Ray cluster of three machines, deployed as an operator would.

PostgreSQL, the version store and Redis are on the host; all that nodes share is the network and
the code.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Self

import httpx
import yaml

from service.client import JSON, ApiError, Client, read_jsonl
from tests.cluster.nodes import Node, RayCluster
from tests.cluster.redis import Redis
from tests.cluster.stores import Stores
from tests.dashboard import SERVE_CONFIG, Dashboard
from tests.faults.site import holding, until

DEPLOY = Path(__file__).parents[2] / "deploy"
EDITS = read_jsonl(DEPLOY / "demo" / "edits.jsonl")[:10]
ACTOR = "ray::ServeReplica:errata"
"""Their processes are titled so, and by their deployment."""
STAGE_TIMEOUT_S = 8
LEASE_S = 5
ANSWER_S = 30.0
SETTINGS = {
    "ERRATA_BEHIND_PROXY": "true",
    "ERRATA_REPLICAS": "2",
    "ERRATA_API_REPLICAS": "2",
    "ERRATA_TRAIN_WORKERS": "2",
    "ERRATA_CHECKPOINT_EVERY_S": "0",
    "ERRATA_STAGE_TIMEOUT_S": str(STAGE_TIMEOUT_S),
    "ERRATA_LEASE_S": str(LEASE_S),
    "ERRATA_FETCH_TIMEOUT_S": "2",
    "ERRATA_FETCH_ATTEMPTS": "2",
    # Of 2 CPUs a node: two ranks need two nodes, and one node has room for both replicas.
    "ERRATA_REPLICA_CPUS": "0.4",
    "ERRATA_API_CPUS": "0.05",
}
CPUS = 2


class Site:
    """`head` reserves nothing; `workers` have a replica and a training rank each."""

    stores: Stores
    cluster: RayCluster
    head: Node
    workers: tuple[Node, Node]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.stores = stack.enter_context(Stores())
            redis = Redis(self.stores.network.host, self.stores.directory)
            host, port = stack.enter_context(redis).address
            environment = {
                **SETTINGS,
                **self.stores.environment(),
                "RAY_REDIS_ADDRESS": f"{host}:{port}",
            }
            self.cluster = stack.enter_context(
                RayCluster(
                    "serving",
                    self.stores.network,
                    self.stores.node,
                    environment,
                    worker_cpus=(CPUS, CPUS),
                )
            )
            self.head, (first, second) = self.cluster.head, self.cluster.workers
            self.workers = first, second
            self._clients: dict[str, Client] = {}
            self.deploy()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for client in self._clients.values():
            client.close()
        self._stack.close()

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.head, *self.workers)

    @property
    def dashboard(self) -> Dashboard:
        return self.cluster.dashboard

    def api(self, node: Node) -> Client:
        """The service by the proxy on `node`."""
        address = node.address
        if address not in self._clients:
            self._clients[address] = Client(f"http://{address}:8000", timeout_s=ANSWER_S)
        return self._clients[address]

    def deploy(self) -> None:
        """The Serve config, as an operator does; until it is ready."""
        self.dashboard.deploy(SERVE_CONFIG)
        until(self.dashboard.is_deployed)

    def refused(self, args: JSON) -> str:
        """Why the Serve config with these `args` is not deployed."""
        config = yaml.safe_load(SERVE_CONFIG.read_text())
        config["applications"][0]["args"] = args
        changed = self.stores.directory / "serve.yaml"
        changed.write_text(yaml.safe_dump(config))
        self.dashboard.deploy(changed)
        now = until(lambda: self._ended_as("DEPLOY_FAILED"))
        return str(now["message"])

    def node(self, address: str) -> Node:
        return next(one for one in self.nodes if one.address == address)

    def note(self, figure: str, value: object) -> None:
        """Shown once all is over."""
        print(f"\n{figure}: {value:.1f}" if isinstance(value, float) else f"\n{figure}: {value}")

    def replicas(self, deployment: str = "Replica") -> dict[str, str]:
        """Address of the node of each running replica, by its id, as Serve has it."""
        found = self.dashboard.application()["deployments"][deployment]["replicas"]
        return {one["replica_id"]: one["node_ip"] for one in found if one["state"] == "RUNNING"}

    def replace_replica(self, node: Node, deployment: str = "Replica") -> None:
        """Ends one on `node`; returns once another one, anywhere, has taken its place."""
        before = self.replicas(deployment).keys()
        [process, *_] = node.processes(f"{ACTOR}:{deployment}")
        process.kill()
        until(lambda: self.is_whole and self.replicas(deployment).keys() != before)

    def spread(self) -> None:
        """A replica and an Api on each worker: after a loss they stay where they were started."""
        for deployment in ("Replica", "Api"):
            while len(homes := {*self.replicas(deployment).values()}) < len(self.workers):
                self.replace_replica(self.node(homes.pop()), deployment)

    def proxies(self) -> list[Node]:
        """Nodes with a proxy: the head, and where Serve has replicas."""
        homes = {home for one in ("Replica", "Api") for home in self.replicas(one).values()}
        return [node for node in self.nodes if node is self.head or node.address in homes]

    def _ended_as(self, status: str) -> JSON | None:
        now = self.dashboard.application()
        return now if now.get("status") == status else None

    @property
    def is_whole(self) -> bool:
        """Each node with a proxy answers, no rollout runs, all replicas hold what is live."""
        try:
            running, apis = self.replicas(), self.replicas("Api")
            shown = [self.api(node).get("/serving") for node in self.proxies()]
        except (ApiError, httpx.HTTPError, KeyError):
            return False
        [now, *_] = shown
        return (
            now["staging"] is None
            and holding(now) == running.keys()
            and len(running) == len(now["replicas"]) == len(apis) == len(self.workers)
        )
