"""The runner: trains one job where it runs, while the service that serves does all the rest.

Meets that service at the database and the version store only. Knows neither Ray nor a terminal.
It holds its job by a lease, so that another runner can go on with it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar
from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncConnection

from service.coordinator.pipeline import BaseModel, train_request
from service.errors import ConfigurationError, Conflict, NotFound, Unavailable
from service.jobs import FINISHED, UNTRAINED, Job, JobState
from service.settings import Settings
from service.store import edits, jobs, retentions, trainers, versions
from service.store.database import Database
from service.store.progress import DatabaseProgress
from service.versions import BASE_VERSION
from workers.contract import ProgressSink, TrainRequest, TrainResult
from workers.errors import StoreUnavailable, WorkersError

log = logging.getLogger(__name__)

POLL_S = 0.5
RENEW_S = 5.0
RETRY_S = 1.0
TELL_S = 30.0
"""How often it says what it waits for."""

T = TypeVar("T")
Step = Callable[[AsyncConnection], Awaitable[T]]
Create = Callable[[AsyncConnection, str], Awaitable[Job]]
"""Makes a new job for the runner of this id."""
Train = Callable[[TrainRequest, ProgressSink], Awaitable[TrainResult]]
Show = Callable[[Job], None]


async def check_base(database: Database, fingerprint: str) -> None:
    """Raises `ConfigurationError` unless the database's versions are edits of this base model."""
    try:
        async with database.transaction() as conn:
            stored = (await versions.get(conn, BASE_VERSION)).base_fingerprint
    except NotFound:
        raise ConfigurationError(
            "database_url: no service has used this database yet; start the one that serves, or "
            "set ERRATA_DATABASE_URL to its database"
        ) from None
    if stored != fingerprint:
        raise ConfigurationError(
            f"model: the service's base model has fingerprint {stored}, the configured one "
            f"{fingerprint}; set ERRATA_MODEL to the same model as there"
        )


class Runner:
    """Trains a job with `train`; every change of the job is given to `show`."""

    def __init__(
        self,
        database: Database,
        database_url: str,
        settings: Settings,
        base: BaseModel,
        train: Train,
        show: Show,
    ) -> None:
        self._database = database
        self._database_url = database_url
        self._settings = settings
        self._base = base
        self._train = train
        self._show = show
        self._id = uuid4().hex

    async def run(self, create: Create) -> Job:
        """The job, trained, or failed: one whose runner is gone if there is any, else a new one.

        Raises `Conflict` if the job was taken from this runner, which stood still for too long.
        Cancelled, it leaves the job for the next runner to go on with.
        """
        job = await self._abandoned()
        if job is None:
            job = await self._patiently(lambda conn: create(conn, self._id))
            log.info("job %s is to be trained here", job.id)
        else:
            log.info("job %s, whose runner is gone, is gone on with", job.id)
        self._show(job)
        training = asyncio.create_task(self._trained(job))
        beside = [asyncio.create_task(task) for task in (self._renew(job.id), self._tell(job.id))]
        try:
            await asyncio.wait([training, *beside], return_when=asyncio.FIRST_COMPLETED)
            for task in beside:
                if task.done() and not training.done():
                    task.result()
            return await training
        finally:
            for each in (training, *beside):
                each.cancel()
            await asyncio.gather(training, *beside, return_exceptions=True)
            await self._let_go(job.id)

    async def _abandoned(self) -> Job | None:
        """An untrained job whose runner is gone, now this one's; None once all others have theirs.

        A lease that has not lapsed says so only if it is renewed.
        """
        first = await self._patiently(trainers.leases)
        if first:
            log.info("looking whether the runners of %s are still there", ", ".join(first))
        while True:
            job = await self._patiently(lambda conn: trainers.take_abandoned(conn, self._id))
            if job is not None:
                return job
            present = await self._patiently(trainers.leases)
            if all(first.get(job_id) != until for job_id, until in present.items()):
                return None
            await asyncio.sleep(POLL_S)

    async def _trained(self, job: Job) -> Job:
        job = await self._claimed(job)
        if job.state is not JobState.TRAINING:
            return job
        request = await self._patiently(lambda conn: self._request(conn, job))
        sink = DatabaseProgress(self._database_url, job.id, self._id)
        try:
            result = await self._with_store(request, sink)
        except WorkersError as error:
            reason = str(error)
            return await self._end(job, lambda conn: self._fail(conn, job, reason))
        seconds = dict(result.seconds)
        return await self._end(
            job,
            lambda conn: jobs.advance(
                conn,
                job.id,
                JobState.TRAINING,
                JobState.EVALUATING,
                trainer_id=self._id,
                seconds=seconds,
            ),
        )

    async def _with_store(self, request: TrainRequest, sink: ProgressSink) -> TrainResult:
        """Trains; while the version store is away, again, from the last checkpoint."""
        while True:
            try:
                return await self._train(request, sink)
            except StoreUnavailable as error:
                log.warning("trying again: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _claimed(self, job: Job) -> Job:
        """The job once a coordinator has claimed its edits and decided what is retained."""
        job_id, since, told = job.id, time.monotonic(), float("-inf")
        while True:
            job, ready, before = await self._patiently(lambda conn: _progress(conn, job_id))
            if ready:
                return job
            now = time.monotonic()
            if now - told >= TELL_S:
                told = now
                _tell_waiting(job, before, now - since)
            await asyncio.sleep(POLL_S)

    async def _request(self, conn: AsyncConnection, job: Job) -> TrainRequest:
        claimed = [edit.record() for edit in await edits.of_job(conn, job.id)]
        retention = await retentions.get(conn, job.id)
        assert retention is not None
        return train_request(self._settings, self._base, job, claimed, retention)

    async def _fail(self, conn: AsyncConnection, job: Job, error: str) -> Job:
        await edits.release(conn, job.id, error)
        return await jobs.advance(
            conn, job.id, JobState.TRAINING, JobState.FAILED, trainer_id=self._id, error=error
        )

    async def _end(self, job: Job, step: Step[Job]) -> Job:
        try:
            return await self._patiently(step)
        except Conflict:
            # Committed, perhaps, before the connection broke.
            present = await self._patiently(lambda conn: jobs.get(conn, job.id))
            if present.trainer_id == self._id and present.state not in UNTRAINED:
                return present
            raise

    async def _renew(self, job_id: str) -> None:
        while True:
            await self._patiently(lambda conn: trainers.renew(conn, job_id, self._id))
            await asyncio.sleep(RENEW_S)

    async def _tell(self, job_id: str) -> None:
        while True:
            self._show(await self._patiently(lambda conn: jobs.get(conn, job_id)))
            await asyncio.sleep(POLL_S)

    async def _let_go(self, job_id: str) -> None:
        """Spares the next runner the wait for the lease's end; it needs not succeed."""
        with suppress(Unavailable):
            async with self._database.transaction() as conn:
                await trainers.let_go(conn, job_id, self._id)

    async def _patiently(self, step: Step[T]) -> T:
        return await patiently(self._database, step)


async def ended(database: Database, job_id: str, show: Show) -> Job:
    """The job, once it has ended."""
    while True:
        job = await patiently(database, lambda conn: jobs.get(conn, job_id))
        if job.state in FINISHED:
            return job
        show(job)
        await asyncio.sleep(POLL_S)


async def patiently(database: Database, step: Step[T]) -> T:
    """Takes a step in a transaction of its own, again while the database is away."""
    while True:
        try:
            async with database.transaction() as conn:
                return await step(conn)
        except Unavailable as error:
            log.warning("trying again: %s", error)
            await asyncio.sleep(RETRY_S)


async def _progress(conn: AsyncConnection, job_id: str) -> tuple[Job, bool, Job | None]:
    """The job, whether it needs no more waiting for, and the one that is first in the queue."""
    job = await jobs.get(conn, job_id)
    decided = job.state is JobState.TRAINING and await retentions.get(conn, job_id) is not None
    return job, decided or job.state not in UNTRAINED, await jobs.next_unfinished(conn)


def _tell_waiting(job: Job, first: Job | None, waited_s: float) -> None:
    if first is not None and first.id != job.id:
        log.info("job %s waits for job %s, which is %s", job.id, first.id, first.state)
    elif waited_s < TELL_S:
        log.info("job %s waits for the service's coordinator to claim its edits", job.id)
    else:
        log.warning(
            "job %s is %s, and no coordinator has gone on with it for %.0f s; is the service "
            "running, on this database?",
            job.id,
            job.state,
            waited_s,
        )
