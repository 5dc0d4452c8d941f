"""The training of a job: here, by one training at a time, or by a runner, which is waited for.

Knows neither what is trained nor what follows. Who may train is decided by the job's row: this
process takes the job, and one that another has taken from it ends with its next progress.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

from service.errors import Unavailable
from service.jobs import UNTRAINED, Job, JobState, Trainer
from service.settings import Settings
from service.store import jobs, trainers
from service.store.database import Database
from service.store.progress import DatabaseProgress
from workers.contract import ProgressSink, TrainRequest, TrainResult
from workers.errors import StoreUnavailable, TrainingFailed

log = logging.getLogger(__name__)

RUNNER_POLL_S = 0.5

Train = Callable[[TrainRequest, ProgressSink], TrainResult]


@dataclass(frozen=True)
class _Running:
    trainer_id: str
    result: asyncio.Task[TrainResult]


class Training:
    """What this process trains. `train` blocks and is called in a thread."""

    def __init__(
        self, database: Database, database_url: str, settings: Settings, train: Train
    ) -> None:
        self._database = database
        self._database_url = database_url
        self._settings = settings
        self._train = train
        self._running: _Running | None = None

    async def take(self, job: Job) -> Job:
        """Makes the job this process's to go on with, unless it is, or a runner is to train it.

        Raises `Conflict` if another leader was faster.
        """
        mine = self._running is not None and self._running.trainer_id == job.trainer_id
        if mine or (job.trained_by is Trainer.RUNNER and job.state in UNTRAINED):
            return job
        async with self._database.transaction() as conn:
            return await trainers.take(conn, job, uuid4().hex)

    async def run(self, job: Job, request: TrainRequest) -> TrainResult:
        """Trains a job that was taken.

        A leader that lost and regained its lock finds its training still running here. Raises
        `Unavailable` while the version store is away: run again, it goes on from its checkpoint.
        """
        assert job.trainer_id is not None
        if self._running is None or self._running.trainer_id != job.trainer_id:
            await self._ended()
            sink = DatabaseProgress(self._database_url, job.id, job.trainer_id)
            blocking = asyncio.to_thread(self._train, request, sink)
            self._running = _Running(job.trainer_id, asyncio.create_task(blocking))
        running = self._running
        try:
            return await asyncio.shield(running.result)
        except StoreUnavailable as error:
            raise Unavailable(f"the training of job {job.id}: {error}") from error
        finally:
            if running.result.done():
                self._running = None

    async def by_runner(self, job: Job) -> Job:
        """The job, once its runner has trained it.

        Raises `TrainingFailed` if it has had none for `runner_timeout_s`.
        """
        while True:
            async with self._database.transaction() as conn:
                job = await jobs.get(conn, job.id)
                abandoned_s = await trainers.abandoned_s(conn, job.id)
            if job.state is not JobState.TRAINING:
                return job
            if abandoned_s > self._settings.runner_timeout_s:
                raise TrainingFailed(
                    f"its runner is gone, and for {self._settings.runner_timeout_s:g} s "
                    "(ERRATA_RUNNER_TIMEOUT_S) no `errata jobs run --here` has gone on with it"
                )
            await asyncio.sleep(RUNNER_POLL_S)

    async def _ended(self) -> None:
        """Waits for a training that another leader has put an end to, which it may not know yet."""
        if self._running is None:
            return
        log.warning("a training that was taken from this process has to end first")
        await asyncio.wait([self._running.result])
        log.warning("it has ended: %s", self._running.result.exception())
        self._running = None
