"""One job from claim to rollout. Each step ends in one transaction that moves the job's state,

so a coordinator that died is followed by one that goes on with the step the database names.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from service.coordinator.examination import examine
from service.coordinator.retention import retained
from service.errors import Conflict, ErrataError, Unavailable, VersionRejected
from service.inference import Inference
from service.jobs import FINISHED, Job, JobKind, JobState
from service.settings import Settings
from service.store import earlier, edits, jobs, serving, versions
from service.store.database import Database
from service.store.progress import DatabaseProgress
from service.versions import BASE_VERSION, VersionState
from workers import formats, presets
from workers.contract import Hparams, ProgressSink, TrainRequest, TrainResult
from workers.errors import WorkersError
from workers.formats import ChatTokenizer, Renderings
from workers.models import ModelFacts

log = logging.getLogger(__name__)

POLL_S = 0.1

Train = Callable[[TrainRequest, ProgressSink], TrainResult]


@dataclass(frozen=True)
class BaseModel:
    """The model all versions of this service are edits of."""

    path: str
    """Directory or hub id."""
    facts: ModelFacts
    fingerprint: str


class Pipeline:
    """Runs jobs. `train` blocks and is called in a thread."""

    def __init__(
        self,
        database: Database,
        database_url: str,
        settings: Settings,
        base: BaseModel,
        tokenizer: ChatTokenizer,
        inference: Inference,
        train: Train,
    ) -> None:
        self._database = database
        self._database_url = database_url
        self._settings = settings
        self._base = base
        self._tokenizer = tokenizer
        self._inference = inference
        self._train = train
        self._trainings: dict[str, asyncio.Task[TrainResult]] = {}
        self._steps: Mapping[JobState, Callable[[Job], Awaitable[Job]]] = {
            JobState.PENDING: self._claim,
            JobState.TRAINING: self._run_training,
            JobState.EVALUATING: self._evaluate,
            JobState.PUBLISHING: self._publish,
            JobState.ROLLING_OUT: self._await_rollout,
        }

    async def run(self, job: Job) -> None:
        """Takes `job` from its present state to its end; raises `Unavailable` to be run again."""
        try:
            while job.state not in FINISHED:
                started = time.monotonic()
                stage, job = job.state, await self._steps[job.state](job)
                log.info("job %s: %s took %.1f s", job.id, stage, time.monotonic() - started)
        except Unavailable:
            raise
        except (ErrataError, WorkersError) as error:
            log.error("job %s failed: %s", job.id, error)
            await self._fail(job, str(error))
        except Exception as error:
            # A job that meets a bug must not keep those behind it waiting.
            log.exception("job %s failed", job.id)
            await self._fail(job, f"internal error: {type(error).__name__}: {error}")

    async def _claim(self, job: Job) -> Job:
        async with self._database.transaction() as conn:
            claimed = await edits.claim(conn, job)
            if claimed == 0:
                raise Conflict("no queued edits are left for this job")
            live = (await serving.current(conn)).version_id
            return await jobs.advance(
                conn,
                job.id,
                JobState.PENDING,
                JobState.TRAINING,
                edits=claimed,
                version_id=await versions.allocate(conn),
                parent_id=live if job.kind is JobKind.EXTEND else BASE_VERSION,
            )

    async def _run_training(self, job: Job) -> Job:
        request = await self._request(job)
        sink = DatabaseProgress(self._database_url, job.id)
        # A leader that lost and regained its lock finds its training still running here.
        if job.id not in self._trainings:
            blocking = asyncio.to_thread(self._train, request, sink)
            self._trainings[job.id] = asyncio.create_task(blocking)
        try:
            result = await asyncio.shield(self._trainings[job.id])
        finally:
            if self._trainings[job.id].done():
                del self._trainings[job.id]
        return await self._advance(job, JobState.EVALUATING, seconds=dict(result.seconds))

    async def _request(self, job: Job) -> TrainRequest:
        async with self._database.transaction() as conn:
            claimed = await edits.of_job(conn, job.id)
        records = tuple(edit.record() for edit in claimed)
        hparams = self._hparams(job)
        retention = await retained(
            self._database, self._inference, self._settings, job, hparams, records
        )
        assert job.version_id is not None
        return TrainRequest(
            job_id=job.id,
            version_id=job.version_id,
            parent_id=None if job.parent_id == BASE_VERSION else job.parent_id,
            model=self._base.path,
            base_fingerprint=self._base.fingerprint,
            version_store=self._settings.version_store_url,
            hparams=hparams,
            edits=records,
            rehearsed=retention.rehearsed,
            anchors=retention.anchors,
            workers=self._settings.train_workers,
            min_workers=self._settings.train_workers_min,
            offload=self._settings.offload,
            cache_budget_bytes=self._settings.train_cache_bytes,
            checkpoint_every_s=self._settings.checkpoint_every_s,
            scratch_dir=str(self._settings.data_dir.resolve() / "train"),
        )

    def _hparams(self, job: Job) -> Hparams:
        return presets.load(self._base.facts, self._settings.hparams, job.hparams)

    def _renderings(self, job: Job) -> Renderings:
        chosen = formats.chosen(self._hparams(job).formats, self._tokenizer)
        return formats.renderings(chosen, self._tokenizer)

    async def _evaluate(self, job: Job) -> Job:
        started = time.monotonic()
        assert job.version_id is not None
        assert job.parent_id is not None
        async with self._database.transaction() as conn:
            claimed = await edits.of_job(conn, job.id)
            before = await earlier.sample(conn, job, "recheck", job.recheck)
        found = await examine(
            self._inference,
            job.version_id,
            job.parent_id,
            [edit.record() for edit in claimed],
            [edit.record() for edit in before],
            self._renderings(job),
        )
        async with self._database.transaction() as conn:
            await versions.publish(
                conn,
                version_id=job.version_id,
                parent_id=job.parent_id,
                job_id=job.id,
                base_fingerprint=self._base.fingerprint,
                metrics=found.metrics,
            )
            await edits.settle(conn, job.id, job.version_id, found.verdicts)
            await versions.record_verdicts(conn, job.version_id, found.earlier)
            return await jobs.advance(
                conn,
                job.id,
                JobState.EVALUATING,
                JobState.PUBLISHING,
                metrics=found.metrics,
                seconds={**job.seconds, "evaluate": time.monotonic() - started},
            )

    async def _publish(self, job: Job) -> Job:
        assert job.version_id is not None
        if not job.activate:
            return await self._advance(job, JobState.DONE)
        while True:
            try:
                async with self._database.transaction() as conn:
                    await serving.request(conn, job.version_id)
                    return await jobs.advance(
                        conn, job.id, JobState.PUBLISHING, JobState.ROLLING_OUT
                    )
            except Conflict as conflict:
                log.info("job %s waits to roll out: %s", job.id, conflict)
                await asyncio.sleep(POLL_S)

    async def _await_rollout(self, job: Job) -> Job:
        started = time.monotonic()
        assert job.version_id is not None
        while True:
            async with self._database.transaction() as conn:
                # In this order: a commit between the two is seen as a commit, never as a give-up.
                staging_id = (await serving.current(conn)).staging_id
                version = await versions.get(conn, job.version_id)
            # Retired: committed, and already followed by another.
            if version.state in (VersionState.LIVE, VersionState.RETIRED):
                seconds = {**job.seconds, "rollout": time.monotonic() - started}
                return await self._advance(job, JobState.DONE, seconds=seconds)
            if version.state is VersionState.REJECTED:
                raise VersionRejected(version.error or f"version {version.id} was rejected")
            if staging_id != version.id:
                # The version is sound and stays published; its edits are in it.
                error = f"{version.id} is published but its rollout was given up: {version.error}"
                return await self._advance(job, JobState.FAILED, error=error)
            await asyncio.sleep(POLL_S)

    async def _advance(self, job: Job, to: JobState, **changes: object) -> Job:
        async with self._database.transaction() as conn:
            return await jobs.advance(conn, job.id, job.state, to, **changes)

    async def _fail(self, job: Job, error: str) -> None:
        async with self._database.transaction() as conn:
            present = await jobs.get(conn, job.id)
            if present.state is not job.state:
                log.warning("job %s is another leader's by now", job.id)
                return
            await edits.release(conn, job.id, error)
            await jobs.advance(conn, job.id, present.state, JobState.FAILED, error=error)
