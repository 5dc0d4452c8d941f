"""One job from claim to rollout. Each step ends in one transaction that moves the job's state,

so a coordinator that died is followed by one that goes on with the step the database names.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from service.coordinator.examination import examine
from service.coordinator.retention import retained
from service.coordinator.training import Train, Training
from service.errors import Conflict, ErrataError, Unavailable, VersionRejected
from service.inference import Inference
from service.jobs import FINISHED, Job, JobKind, JobState, Retention, Trainer
from service.settings import Settings
from service.store import earlier, edits, jobs, serving, versions
from service.store.database import Database
from service.versions import BASE_VERSION, VersionState
from workers import formats, presets
from workers.contract import EditRecord, Hparams, TrainRequest
from workers.errors import WorkersError
from workers.formats import ChatTokenizer, Renderings
from workers.models import ModelFacts

log = logging.getLogger(__name__)

POLL_S = 0.1


@dataclass(frozen=True)
class BaseModel:
    """The model all versions of this service are edits of."""

    path: str
    """Directory or hub id."""
    facts: ModelFacts
    fingerprint: str


def train_request(
    settings: Settings,
    base: BaseModel,
    job: Job,
    edits: Sequence[EditRecord],
    retention: Retention,
) -> TrainRequest:
    """What whoever trains `job` needs to know, from its own settings."""
    assert job.version_id is not None
    return TrainRequest(
        job_id=job.id,
        version_id=job.version_id,
        parent_id=None if job.parent_id == BASE_VERSION else job.parent_id,
        model=base.path,
        base_fingerprint=base.fingerprint,
        version_store=settings.version_store_url,
        hparams=presets.load(base.facts, settings.hparams, job.hparams),
        edits=tuple(edits),
        rehearsed=retention.rehearsed,
        anchors=retention.anchors,
        workers=settings.train_workers,
        min_workers=settings.train_workers_min,
        device=settings.train_device,
        offload=settings.offload,
        cache_budget_bytes=settings.train_cache_bytes,
        checkpoint_every_s=settings.checkpoint_every_s,
        scratch_dir=str(settings.data_dir.resolve() / "train"),
    )


class Pipeline:
    """Runs jobs; see `Coordinator` for what it is given."""

    def __init__(
        self,
        database: Database,
        database_url: str,
        settings: Settings,
        base: BaseModel,
        tokenizer: Callable[[], ChatTokenizer],
        inference: Inference,
        train: Train,
    ) -> None:
        self._database = database
        self._settings = settings
        self._base = base
        self._tokenizer = tokenizer
        self._inference = inference
        self._training = Training(database, database_url, settings, train)
        self._steps: Mapping[JobState, Callable[[Job], Awaitable[Job]]] = {
            JobState.PENDING: self._claim,
            JobState.TRAINING: self._train,
            JobState.EVALUATING: self._evaluate,
            JobState.PUBLISHING: self._publish,
            JobState.ROLLING_OUT: self._await_rollout,
        }

    async def run(self, job: Job) -> None:
        """Takes `job` from its present state to its end; raises `Unavailable` to be run again."""
        try:
            job = await self._training.take(job)
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
                trainer_id=job.trainer_id,
                edits=claimed,
                version_id=await versions.allocate(conn),
                parent_id=live if job.kind is JobKind.EXTEND else BASE_VERSION,
            )

    async def _train(self, job: Job) -> Job:
        async with self._database.transaction() as conn:
            claimed = [edit.record() for edit in await edits.of_job(conn, job.id)]
        retention = await retained(
            self._database, self._inference, self._settings, job, self._hparams(job), claimed
        )
        if job.trained_by is Trainer.RUNNER:
            return await self._training.by_runner(job)
        request = train_request(self._settings, self._base, job, claimed, retention)
        result = await self._training.run(job, request)
        return await self._advance(job, JobState.EVALUATING, seconds=dict(result.seconds))

    def _hparams(self, job: Job) -> Hparams:
        return presets.load(self._base.facts, self._settings.hparams, job.hparams)

    async def _renderings(self, job: Job) -> Renderings:
        tokenizer = await asyncio.to_thread(self._tokenizer)
        chosen = formats.chosen(self._hparams(job).formats, tokenizer)
        return formats.renderings(chosen, tokenizer)

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
            await self._renderings(job),
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
                trainer_id=job.trainer_id,
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
            return await jobs.advance(
                conn, job.id, job.state, to, trainer_id=job.trainer_id, **changes
            )

    async def _fail(self, job: Job, error: str) -> None:
        try:
            async with self._database.transaction() as conn:
                await edits.release(conn, job.id, error)
                await jobs.advance(
                    conn,
                    job.id,
                    job.state,
                    JobState.FAILED,
                    trainer_id=job.trainer_id,
                    error=error,
                )
        except Conflict as conflict:
            log.warning("job %s is another leader's by now: %s", job.id, conflict)
