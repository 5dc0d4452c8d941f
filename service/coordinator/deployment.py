"""The Coordinator process: leads, or waits to lead. Owns no state that must survive it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from service.coordinator.pipeline import BaseModel, Pipeline
from service.coordinator.policy import Policy
from service.coordinator.rollout import Rollout, Running
from service.coordinator.training import Train
from service.edits import EditState
from service.errors import Unavailable
from service.inference import Inference
from service.jobs import JobKind
from service.settings import Settings
from service.store import edits, idempotency, jobs, replicas, serving
from service.store.database import Database
from service.store.leadership import Leadership
from workers.formats import ChatTokenizer

log = logging.getLogger(__name__)

POLL_S = 1.0
PRUNE_S = 60.0
STATEMENT_S = 600.0
"""Those about all edits of a job take long; a server that is away is noticed by the lock's loss."""
FORGET_LEASES = 10
"""A replica without a heartbeat for so many leases is forgotten."""


class Coordinator:
    """While it leads, drives jobs one after the other and rollouts beside them.

    Made in a running event loop. `tokenizer` loads the base model's; `inference` is the replicas,
    to examine versions with, `running` tells which of those in this Ray `cluster` run; `train` and
    `tokenizer` block and are called in a thread.
    """

    def __init__(
        self,
        settings: Settings,
        database_url: str,
        base: BaseModel,
        tokenizer: Callable[[], ChatTokenizer],
        inference: Inference,
        running: Running,
        train: Train,
        cluster: str = "",
    ) -> None:
        self._settings = settings
        self._leadership = Leadership(database_url)
        self._database = Database(database_url, answer_s=STATEMENT_S)
        self._pipeline = Pipeline(
            self._database, database_url, settings, base, tokenizer, inference, train
        )
        self._rollout = Rollout(self._database, inference, settings, running, cluster)
        self._policy = Policy(settings.job_after_edits, settings.job_after_s)
        self._jobs_changed, self._rollout_changed = asyncio.Event(), asyncio.Event()
        self._main = asyncio.create_task(self._run())

    async def check_health(self) -> None:
        """Raises the error that ended the coordinator's work, so that Serve restarts it."""
        if self._main.done():
            self._main.result()

    async def stop(self) -> None:
        """Gives the lead up; what it was doing is for the next leader to go on with."""
        self._main.cancel()
        await asyncio.gather(self._main, return_exceptions=True)
        await self._database.dispose()

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen(jobs.CHANNEL, self._jobs_changed))
                for channel in (serving.CHANNEL, replicas.CHANNEL):
                    tasks.create_task(self._listen(channel, self._rollout_changed))
                tasks.create_task(self._lead())
        except Exception:
            # Serve says only that the health check failed.
            log.exception("the coordinator ends and is started again")
            raise

    async def _listen(self, channel: str, changed: asyncio.Event) -> None:
        async for _ in self._database.listen(channel):
            changed.set()

    async def _lead(self) -> None:
        while True:
            await self._leadership.acquire()
            log.info("leading")
            work = [
                asyncio.create_task(self._watch_lock()),
                asyncio.create_task(self._repeat(self._do_job, self._jobs_changed)),
                asyncio.create_task(self._repeat(self._rollout.step, self._rollout_changed)),
                asyncio.create_task(self._prune()),
            ]
            try:
                await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in work:
                    task.cancel()
                ended = await asyncio.gather(*work, return_exceptions=True)
                await self._leadership.release()
            for end in ended:
                if isinstance(end, Exception):
                    raise end

    async def _watch_lock(self) -> None:
        while await self._leadership.held():
            await asyncio.sleep(POLL_S)
        log.warning("no longer leading: the connection that held the lock was lost")

    async def _repeat(self, step: Callable[[], Awaitable[None]], changed: asyncio.Event) -> None:
        """At once, then at every announcement, also of one that came during a step; and polls."""
        while True:
            changed.clear()
            try:
                await step()
            except Unavailable as error:
                log.warning("trying again: %s", error)
                await asyncio.sleep(POLL_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await changed.wait()

    async def _prune(self) -> None:
        while True:
            try:
                async with self._database.transaction() as conn:
                    await replicas.prune(conn, FORGET_LEASES * self._settings.lease_s)
                    await idempotency.prune(conn)
            except Unavailable as error:
                log.warning("nothing pruned: %s", error)
            await asyncio.sleep(PRUNE_S)

    async def _do_job(self) -> None:
        async with self._database.transaction() as conn:
            job = await jobs.next_unfinished(conn)
            age = await edits.oldest_queued_age(conn)
            if job is None and self._policy.due(await edits.count(conn, EditState.QUEUED), age):
                job = await jobs.create(
                    conn, kind=JobKind.EXTEND, activate=True, recheck=self._settings.recheck
                )
        if job is not None:
            await self._pipeline.run(job)
