"""A whole service, `errata up`, on a PostgreSQL and a version store that the tests can take away.

Both are reached through proxies. Versions are published as a job would, but without training.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import parse_qs, urlsplit

import psutil
import torch
from safetensors.torch import load_file

from service.client import JSON, ApiError, Client
from service.edits import NewEdit
from service.jobs import JobState
from service.settings import DEMO_MODEL
from service.store import edits, jobs, versions
from service.store.database import Database
from service.store.embedded import EmbeddedPostgres
from service.versions import BASE_VERSION, Verdict
from tests.faults.object_store import BUCKET, ObjectStore
from tests.proxy import TcpProxy
from tests.service_process import ServiceProcess
from workers import artifact
from workers.contract import Hparams, TrainResult
from workers.models import fingerprint
from workers.slices import Writer

TUNED = "model.layers.2.mlp.down_proj.weight"
STAGE_TIMEOUT_S = 10
PROCESSES = {"Replica": 2, "Api": 2, "Coordinator": 1}

T = TypeVar("T")


def until(look: Callable[[], T | None], seconds: float = 300) -> T:
    """What `look` finds, once it finds something that is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.2)
    return found


def holding(now: JSON) -> set[str]:
    """Ids of the replicas that serve and hold what is live, by what GET /serving answered."""
    return {
        one["id"]
        for one in now["replicas"]
        if one["state"] == "ready" and now["version"] in {"v0", *one["resident"]}
    }


class Site:
    """`service` is the present run; `database` and `store` are the proxies before the two."""

    service: ServiceProcess
    database: TcpProxy
    store: TcpProxy

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # Not pytest's directory: PostgreSQL's own account must pass through its parents.
            self._directory = Path(tempfile.mkdtemp(prefix="errata-"))
            stack.callback(shutil.rmtree, self._directory)
            self.postgres = EmbeddedPostgres(self._directory)
            self._url = self.postgres.start()
            stack.callback(self.postgres.stop)
            self.objects = stack.enter_context(ObjectStore())
            sockets = Path(parse_qs(urlsplit(self._url).query)["host"][0])
            self.database = stack.enter_context(TcpProxy(sockets / ".s.PGSQL.5432"))
            self.store = stack.enter_context(TcpProxy(self.objects.address))
            self.fingerprint = fingerprint(DEMO_MODEL)
            self._base = load_file(DEMO_MODEL / "model.safetensors")[TUNED].float()
            self.start(checkpoint_every_s=0)
            stack.callback(self._stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    @property
    def api(self) -> Client:
        return self.service.client

    @property
    def database_url(self) -> str:
        """Past the proxy."""
        return self._url

    @property
    def is_whole(self) -> bool:
        """All processes run, no rollout does, and both replicas hold what is live."""
        try:
            now = self.api.get("/serving")
        except ApiError:
            return False
        return (
            now["staging"] is None
            and len(holding(now)) == len(now["replicas"]) == 2
            and all(len(self.service.actors(name)) == n for name, n in PROCESSES.items())
        )

    def activate(self, version_id: str, **options: object) -> JSON:
        return self.api.post(f"/versions/{version_id}/activate", options)

    def start(self, checkpoint_every_s: float = 30) -> None:
        host, port = self.database.address
        store_host, store_port = self.store.address
        self.service = ServiceProcess(
            self._directory / "data",
            ERRATA_DATABASE_URL=f"postgresql://postgres@{host}:{port}/postgres",
            ERRATA_VERSION_STORE=f"s3://{BUCKET}",
            ERRATA_API_REPLICAS="2",
            ERRATA_CHECKPOINT_EVERY_S=str(checkpoint_every_s),
            ERRATA_STAGE_TIMEOUT_S=str(STAGE_TIMEOUT_S),
            ERRATA_FETCH_TIMEOUT_S="2",
            ERRATA_FETCH_ATTEMPTS="2",
            AWS_ENDPOINT_URL=f"http://{store_host}:{store_port}",
            AWS_ACCESS_KEY_ID="test",
            AWS_SECRET_ACCESS_KEY="test",
            AWS_DEFAULT_REGION="us-east-1",
        )

    def kill_everything(self) -> None:
        """kill -9 of the service and the database; the database comes back, as its owner would."""
        self.service.kill_everything()
        lines = (self._directory / "postgres" / "postmaster.pid").read_text().splitlines()
        first = psutil.Process(int(lines[0]))
        family = [first, *first.children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)
        self.postgres.start()

    def publish(self, *, noise: float, spoil: Callable[[str, bytes], bytes] | None = None) -> str:
        """A new version's id: the base with `noise` added, its one edit not held.

        `spoil` changes its files, given their names.
        """
        version_id = asyncio.run(self._allocate())
        local = self._directory / "made"
        seed = torch.Generator().manual_seed(int(version_id[1:]))
        tensor = self._base + noise * torch.randn(self._base.shape, generator=seed)
        piece = artifact.write_slice(
            str(local), version_id, TUNED, tensor.shape, 0, tensor.flatten(), Writer(0, 1, "test")
        )
        artifact.write_manifest(str(local), self._lineage(version_id), [piece])
        for file in sorted((local / "versions" / version_id).iterdir(), reverse=True):
            content = file.read_bytes()
            changed = content if spoil is None else spoil(file.name, content)
            self.objects.put(f"versions/{version_id}/{file.name}", changed)
        asyncio.run(self._register(version_id))
        return version_id

    def _lineage(self, version_id: str) -> artifact.Lineage:
        return artifact.Lineage(
            version_id=version_id,
            parent_id=None,
            job_id="job_test",
            base_fingerprint=self.fingerprint,
            hparams=Hparams(parameters=(TUNED,), learning_rate=1e-3),
            edits=("ed_test",),
            training=TrainResult(
                version_id=version_id, epochs=1, steps=1, epoch_losses=(0.0,), seconds={}
            ),
            created_at=datetime.now(UTC),
        )

    async def _allocate(self) -> str:
        store = Database(self._url, pool_size=1)
        async with store.transaction() as conn:
            version_id = await versions.allocate(conn)
        await store.dispose()
        return version_id

    async def _register(self, version_id: str) -> None:
        """As its job's steps would, in one transaction: the coordinator never sees the job."""
        store = Database(self._url, pool_size=1)
        async with store.transaction() as conn:
            (edit,) = await edits.add(conn, [NewEdit(f"The fact of {version_id} is", "new")])
            job = await jobs.create(conn, edit_ids=[edit.id], activate=False)
            await edits.claim(conn, job)
            await jobs.advance(conn, job.id, JobState.PENDING, JobState.TRAINING)
            await jobs.advance(conn, job.id, JobState.TRAINING, JobState.EVALUATING)
            await versions.publish(
                conn,
                version_id=version_id,
                parent_id=BASE_VERSION,
                job_id=job.id,
                base_fingerprint=self.fingerprint,
                metrics={},
            )
            verdict = Verdict(
                edit_id=edit.id, reliable=False, answer="", generalization=None, locality=None
            )
            await edits.settle(conn, job.id, version_id, [verdict])
            await jobs.advance(
                conn,
                job.id,
                JobState.EVALUATING,
                JobState.PUBLISHING,
                version_id=version_id,
            )
            await jobs.advance(conn, job.id, JobState.PUBLISHING, JobState.DONE)
        await store.dispose()

    def _stop(self) -> None:
        assert self.service.stop() == 0
