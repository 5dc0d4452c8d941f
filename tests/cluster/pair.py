"""Two Ray clusters, each with a whole service on it, over one PostgreSQL and one version store.

What happens to them happens to real processes and machines; jobs are really trained.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import ClassVar, Self

import psutil
import psycopg

from service.client import JSON, ApiError, Client, read_jsonl
from service.versions import BASE_VERSION
from tests.cluster.nodes import Node, RayCluster
from tests.cluster.site import ACTOR, DEPLOY, SETTINGS
from tests.cluster.stores import Stores
from tests.cluster.watching import watching
from tests.dashboard import SERVE_CONFIG
from tests.faults.audit import LOSE_LOCK
from tests.faults.rivals import CLUSTERS, Figures, Rivals
from tests.faults.site import holding, until
from workers import presets

HPARAMS = Path(presets.__file__).parent / "hparams" / "demo.yaml"
"""To be trained in one format alone: jobs are many, and short."""
FACTS = read_jsonl(DEPLOY / "demo" / "edits.jsonl")
CLIENT_TIMEOUT_S = 5.0
PAUSE_S = 0.5
CPUS = 2
ALONE = {
    **SETTINGS,
    "ERRATA_REPLICAS": "1",
    "ERRATA_API_REPLICAS": "1",
    "ERRATA_TRAIN_WORKERS": "1",
    "ERRATA_JOB_AFTER_EDITS": "3",
    "ERRATA_JOB_AFTER_S": "10",
    "ERRATA_RECHECK": "5",
}
Work = Callable[[], object]


class Cluster:
    """Of one node, with all that a service is."""

    def __init__(self, name: str, stores: Stores) -> None:
        self.name = name
        hparams = stores.directory / "hparams.yaml"
        hparams.write_text(f"{HPARAMS.read_text()}\nformats: [raw]\n")
        environment = {
            **ALONE,
            **stores.environment(application_name=name),
            "ERRATA_HPARAMS": str(hparams),
        }
        self._ray = RayCluster(name, stores.network, stores.node, environment, head_cpus=CPUS)
        self.api = Client(f"http://{self.node.address}:8000", timeout_s=CLIENT_TIMEOUT_S)
        self.able = True
        """Whether it is left alone, and serves."""

    def __enter__(self) -> Self:
        self._ray.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.api.close()
        self._ray.__exit__(*exc_info)

    @property
    def node(self) -> Node:
        return self._ray.head

    def deploy(self) -> None:
        """As an operator does, once the node is there; until it is ready."""
        until(lambda: self._ray.dashboard.nodes() == 1)
        self._ray.dashboard.deploy(SERVE_CONFIG)
        until(self._ray.dashboard.is_deployed)

    def coordinators(self) -> list[psutil.Process]:
        """The one that runs, if one does."""
        return self.node.processes(f"{ACTOR}:Coordinator")

    def serving(self) -> JSON | None:
        try:
            return dict(self.api.get("/serving"))
        except ApiError:
            return None


class Pair(Rivals[Cluster]):
    """`watch` are clients that ask each cluster, at `addresses`, all the time."""

    faults: ClassVar[Mapping[str, int]] = {
        "kill": 5,
        "kill_rank": 3,
        "kill_api": 1,
        "kill_replica": 1,
        "stop": 3,
        "lose_lock": 2,
        "cut_off": 3,
        "crash": 1,
    }
    pause_s: ClassVar[tuple[float, float]] = (1.0, 25.0)

    def __init__(self, stores: Stores, seed: int) -> None:
        super().__init__(stores.postgres.url, seed)
        self._stores = stores
        self._clusters: list[Cluster] = []
        self.figures = Figures(faults=dict.fromkeys(self.faults, 0))

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for name in CLUSTERS:
                cluster = stack.enter_context(Cluster(name, self._stores))
                self._clusters.append(cluster)
                await asyncio.to_thread(cluster.deploy)
            self.addresses = [cluster.node.address for cluster in self._clusters]
            self.watch = stack.enter_context(watching(self.addresses, FACTS[0]["prompt"], PAUSE_S))
            stack.push_async_callback(self.end_recoveries)
            # So that there is another version to be activated from the beginning.
            await asyncio.to_thread(self._train_first)
            yield
            await asyncio.to_thread(until, self._agree)

    def _train_first(self) -> None:
        api = self._clusters[0].api
        stored = api.submit(FACTS[:3])
        self._invariants.acknowledged.update(edit["id"] for edit in stored)
        until(lambda: api.get("/serving")["version"] != BASE_VERSION)

    def _agree(self) -> bool:
        """Both serve the same, and know of the same replicas."""
        [one, other] = (cluster.serving() for cluster in self._clusters)
        return (
            one is not None
            and other is not None
            and one["staging"] is None
            and one["generation"] == other["generation"]
            and holding(one) == holding(other)
            and len(holding(one)) == len(self._clusters)
        )

    def _able(self) -> Sequence[Cluster]:
        return [cluster for cluster in self._clusters if cluster.able]

    def _check_alive(self) -> None:
        for task in self._recoveries:
            if task.done():
                task.result()

    # Beside the faults

    async def _edit(self) -> None:
        """One fact after the other, at either cluster; and now and then any version goes live."""
        for fact in cycle(FACTS[3:]):
            await asyncio.sleep(self._random.uniform(1.0, 4.0))
            api = self._random.choice(self._clusters).api
            with suppress(ApiError):
                [stored] = await asyncio.to_thread(api.submit, [fact])
                self._invariants.acknowledged.add(stored["id"])
            if self._random.random() < 0.5:
                with suppress(ApiError):
                    await asyncio.to_thread(self._activate, api)

    def _activate(self, api: Client) -> None:
        known = [one["id"] for one in api.pages("/versions", "versions")]
        api.post(f"/versions/{self._random.choice(known)}/activate", {})

    # Faults

    async def _kill(self, cluster: Cluster) -> bool:
        return self._end(cluster.coordinators())

    async def _kill_rank(self, cluster: Cluster) -> bool:
        return self._end(cluster.node.processes("ray::RayTrainWorker"))

    async def _kill_api(self, cluster: Cluster) -> bool:
        return self._end(cluster.node.processes(f"{ACTOR}:Api"))

    async def _kill_replica(self, cluster: Cluster) -> bool:
        return self._end(cluster.node.processes(f"{ACTOR}:Replica"))

    def _end(self, processes: Sequence[psutil.Process]) -> bool:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return bool(processes)

    async def _stop(self, cluster: Cluster) -> bool:
        """For so short that it goes on, or for so long that Serve starts another one."""
        stopped = cluster.coordinators()

        async def resume() -> None:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

        for process in stopped:
            process.suspend()
        self.later(self._random.uniform(0.5, 30.0), resume)
        return bool(stopped)

    async def _lose_lock(self, cluster: Cluster) -> bool:
        async with await psycopg.AsyncConnection.connect(self._url, autocommit=True) as conn:
            return (await conn.execute(LOSE_LOCK, (cluster.name,))).rowcount > 0

    async def _cut_off(self, cluster: Cluster) -> None:
        """From the database and all clients; its own processes reach each other."""
        cluster.node.machine.cut_off()
        self._unable(cluster, self._random.uniform(1.0, 40.0), cluster.node.machine.reconnect)

    async def _crash(self, cluster: Cluster) -> None:
        """The whole machine; as an operator does, the service is deployed on the next one."""
        await asyncio.to_thread(cluster.node.crash)

        def replace() -> None:
            cluster.node.restart()
            cluster.deploy()

        self._unable(cluster, 0.0, replace)

    def _unable(self, cluster: Cluster, seconds: float, recover: Work) -> None:
        cluster.able = False

        async def recovered() -> None:
            await asyncio.to_thread(recover)
            cluster.able = True

        self.later(seconds, recovered)
