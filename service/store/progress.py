"""Progress of a training job, written from wherever its first rank runs."""

import asyncio
import logging

from service.errors import Unavailable
from service.store import trainers
from service.store.database import Database
from workers.contract import Progress

log = logging.getLogger(__name__)


class DatabaseProgress:
    """A `workers.contract.ProgressSink` that writes to the job's row; it can be pickled.

    Progress that cannot be written is dropped: training goes on while the database is away. Once
    another than `trainer_id` trains the job, or it has ended, `Conflict` ends this training.
    """

    def __init__(self, database_url: str, job_id: str, trainer_id: str) -> None:
        self._database_url = database_url
        self._job_id = job_id
        self._trainer_id = trainer_id

    def __call__(self, progress: Progress) -> None:
        try:
            asyncio.run(self._write(progress))
        except Unavailable as error:
            log.warning("progress of %s not recorded: %s", self._job_id, error)

    async def _write(self, progress: Progress) -> None:
        database = Database(self._database_url, pool_size=1)
        try:
            async with database.transaction() as conn:
                await trainers.record_progress(conn, self._job_id, self._trainer_id, progress)
        finally:
            await database.dispose()
