"""From staging to committed: every live replica acknowledges, then one row changes.

Knows replicas only by their rows. Its state is in the database: any leader can go on with it.
"""

import asyncio
import logging
import time

from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Conflict
from service.settings import Settings
from service.store import replicas, serving
from service.store.database import Database
from service.versions import ReplicaStatus, Serving, StagedVersion

log = logging.getLogger(__name__)

POLL_S = 0.05


class Rollout:
    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    async def drive(self) -> None:
        """Takes the rollout under way, if any, to its end: committed, rejected or given up.

        A replica that has not acknowledged within `stage_timeout_s` is fenced and not waited for.
        """
        async with self._database.transaction() as conn:
            version_id = (await serving.current(conn)).staging_id
        if version_id is None:
            return
        deadline = time.monotonic() + self._settings.stage_timeout_s
        while not await self._try_end(version_id, late=time.monotonic() > deadline):
            await asyncio.sleep(POLL_S)

    async def _try_end(self, version_id: str, *, late: bool) -> bool:
        try:
            async with self._database.transaction() as conn:
                return await self._step(conn, version_id, late=late)
        except Conflict as conflict:
            # A replica joined or left, or another leader acted, since the rows were read.
            log.info("rollout of %s: %s", version_id, conflict)
            if not late:
                return False
            async with self._database.transaction() as conn:
                await self._give_up(conn, version_id, str(conflict))
            return True

    async def _step(self, conn: AsyncConnection, version_id: str, *, late: bool) -> bool:
        present = await serving.current(conn)
        if present.staging_id != version_id:
            return True
        live = await replicas.live(conn, self._settings.lease_s)
        acks = {replica.id: _ack(replica, version_id) for replica in live}
        failed = next((ack for ack in acks.values() if ack and ack.error), None)
        if failed:
            log.error("version %s rejected: %s", version_id, failed.error)
            await serving.abandon(conn, version_id, error=failed.error, rejected=True)
            return True
        missing = [replica_id for replica_id, ack in acks.items() if ack is None]
        ready = [replica_id for replica_id, ack in acks.items() if ack]
        if ready and not missing:
            await self._commit(conn, present, version_id, ready)
            return True
        if late:
            for replica_id in missing:
                log.warning("replica %s fenced: %s not staged in time", replica_id, version_id)
                await replicas.fence(conn, replica_id)
        if late and not ready:
            waited = f"no replica staged it within {self._settings.stage_timeout_s:g} s"
            await self._give_up(conn, version_id, waited)
        return late and not ready

    async def _give_up(self, conn: AsyncConnection, version_id: str, error: str) -> None:
        log.error("the rollout of %s is given up: %s", version_id, error)
        await serving.abandon(conn, version_id, error=error, rejected=False)

    async def _commit(
        self, conn: AsyncConnection, present: Serving, version_id: str, ready: list[str]
    ) -> None:
        committed = await serving.commit(conn, version_id, present.generation, ready)
        log.info("generation %d: %s on %d replicas", committed.generation, version_id, len(ready))


def _ack(replica: ReplicaStatus, version_id: str) -> StagedVersion | None:
    return next((staged for staged in replica.staged if staged.version_id == version_id), None)
