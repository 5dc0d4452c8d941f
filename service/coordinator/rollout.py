"""From staging to committed: every live replica acknowledges, the gate is passed, one row changes.

Knows replicas only by their rows and by who runs. Its state is in the database: any leader can go
on with it, from whichever state the one before it left.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from service import metrics
from service.coordinator.gate import Gate, refusal
from service.errors import (
    ConfigurationError,
    Conflict,
    NotFound,
    Unavailable,
    VersionRejected,
)
from service.inference import CompletionRequest, Inference
from service.settings import Settings
from service.store import replicas, serving, versions
from service.store.database import Database
from service.versions import BASE_VERSION, ReplicaStatus, Serving, StagedVersion

log = logging.getLogger(__name__)

PROMPT_S = 0.5
"""A replica that has not acknowledged after so long may be one that has ended."""

Running = Callable[[], Awaitable[set[str] | None]]
"""Ids of the replicas of one cluster that whoever starts them counts as running; None: unknown."""


class Rollout:
    """Drives what the serving row asks for, a step at a time; `step` is called at every change.

    Live is a replica with a fresh lease that also runs. One that has not acknowledged within
    `stage_timeout_s`, when another has, is fenced and not waited for.
    """

    def __init__(
        self,
        database: Database,
        inference: Inference,
        settings: Settings,
        running: Running,
        cluster: str = "",
    ) -> None:
        """`running` knows the replicas of `cluster`; of those of another, leases tell."""
        self._cluster = cluster
        self._database = database
        self._inference = inference
        self._settings = settings
        self._running = running
        self._gate = Gate(database, inference, settings)
        self._begun: tuple[tuple[str, datetime] | None, float] = (None, 0.0)
        """The staging that is being driven, and since when by the monotonic clock."""

    async def step(self) -> None:
        """As far as it goes now: to the end of the rollout, or until a replica has something new.

        Raises `Unavailable` to be called again.
        """
        present = await self._present()
        metrics.canary(present.canary.percent / 100 if present.canary else 0.0)
        if present.staging_id is None:
            await self._promote_if_due(present)
            return
        version_id, late = present.staging_id, self._is_late(present)
        try:
            await self._advance(version_id, late)
        except Conflict as conflict:
            # A replica joined or left, or another leader acted, since the rows were read.
            log.info("rollout of %s: %s", version_id, conflict)
            if late:
                await self._give_up(version_id, str(conflict))
        except ConfigurationError as error:
            await self._give_up(version_id, str(error))

    async def _present(self) -> Serving:
        try:
            async with self._database.transaction() as conn:
                return await serving.current(conn)
        except Unavailable:
            # No replica could acknowledge meanwhile: all get their time anew.
            self._begun = (None, 0.0)
            raise

    def _is_late(self, present: Serving) -> bool:
        key = (present.staging_id or "", present.updated_at)
        if self._begun[0] != key:
            self._begun = (key, time.monotonic())
        return time.monotonic() - self._begun[1] > self._settings.stage_timeout_s

    async def _advance(self, version_id: str, late: bool) -> None:
        if self._settings.replica_range[0] == 0 and not late and not await self._running():
            await self._wake_a_replica()
        async with self._database.transaction() as conn:
            ready = await self._staged(conn, version_id, late)
            if ready is None:
                return
            present = await serving.current(conn)
            version = await versions.get(conn, version_id)
            if not self._gate.concerns(version):
                await self._commit(conn, present, version_id, ready)
                return
            await serving.staged(conn, version_id, present.generation, ready)
        try:
            found = await self._gate.ask(version_id, present.version_id)
        except Unavailable as error:
            if late:
                await self._give_up(version_id, f"the gate could not ask it: {error}")
            raise
        except (NotFound, VersionRejected) as error:
            # A replica that joined meanwhile refuses it.
            async with self._database.transaction() as conn:
                await self._reject(conn, version_id, str(error))
            return
        if found.passed:
            # Once more from the top: replicas may have come and gone meanwhile.
            await self._advance(version_id, late)
            return
        async with self._database.transaction() as conn:
            await self._reject(conn, version_id, refusal(found))

    async def _staged(self, conn: AsyncConnection, version_id: str, late: bool) -> list[str] | None:
        """The live replicas, once all hold the version; None while there is nothing to go on with.

        A version that one of them refuses is rejected.
        """
        if (await serving.current(conn)).staging_id != version_id:
            return None
        live = await replicas.live(conn, self._settings.lease_s)
        acks = {replica.id: _ack(replica, version_id) for replica in live}
        if None in acks.values():
            if time.monotonic() - self._begun[1] < PROMPT_S:
                return None
            # Only then: to ask who runs takes longer than all else here.
            running = await self._running()
            acks = {
                replica.id: acks[replica.id]
                for replica in live
                if running is None or replica.cluster != self._cluster or replica.id in running
            }
        failed = next((ack for ack in acks.values() if ack and ack.error), None)
        if failed:
            await self._reject(conn, version_id, failed.error or "")
            return None
        missing = [replica_id for replica_id, ack in acks.items() if ack is None]
        ready = [replica_id for replica_id, ack in acks.items() if ack]
        if late:
            await self._pass_over(conn, version_id, missing, ready)
        return ready if ready and not missing else None

    async def _wake_a_replica(self) -> None:
        """Scaled to zero: a query brings one back, which stages before it is ready."""
        await self._inference.complete(
            CompletionRequest(BASE_VERSION, (0,), max_tokens=1, temperature=0.0)
        )

    async def _pass_over(
        self, conn: AsyncConnection, version_id: str, missing: list[str], ready: list[str]
    ) -> None:
        if not ready:
            # Nobody is behind the others: what keeps all from staging is no reason to restart them.
            waited = f"no replica staged it within {self._settings.stage_timeout_s:g} s"
            await self._abandon(conn, version_id, waited)
            return
        for replica_id in missing:
            log.warning("replica %s fenced: %s not staged in time", replica_id, version_id)
            await replicas.fence(conn, replica_id)

    async def _give_up(self, version_id: str, error: str) -> None:
        async with self._database.transaction() as conn:
            await self._abandon(conn, version_id, error)

    async def _abandon(self, conn: AsyncConnection, version_id: str, error: str) -> None:
        log.error("the rollout of %s is given up: %s", version_id, error)
        await serving.abandon(conn, version_id, error=error, rejected=False)
        self._ended("given_up")

    async def _reject(self, conn: AsyncConnection, version_id: str, error: str) -> None:
        log.error("version %s rejected: %s", version_id, error)
        await serving.abandon(conn, version_id, error=error, rejected=True)
        self._ended("rejected")

    def _ended(self, outcome: str) -> None:
        metrics.rollout_ended(outcome, time.monotonic() - self._begun[1])

    async def _commit(
        self, conn: AsyncConnection, present: Serving, version_id: str, ready: list[str]
    ) -> None:
        started = time.monotonic()
        committed = await serving.commit(conn, version_id, present.generation, ready)
        metrics.committed(time.monotonic() - started)
        self._ended("committed")
        log.info("generation %d: %s on %d replicas", committed.generation, version_id, len(ready))

    async def _promote_if_due(self, present: Serving) -> None:
        """A canary whose time has come is asked again by the gate: all queries, or none."""
        async with self._database.transaction() as conn:
            version_id = await serving.promotion_due(conn)
        if version_id is None:
            return
        try:
            found = await self._gate.ask(version_id, present.version_id)
            against = None if found.passed else refusal(found)
        except (NotFound, VersionRejected) as error:
            against = str(error)
        except ConfigurationError as error:
            log.error("canary %s cannot be promoted: %s", version_id, error)
            return
        try:
            async with self._database.transaction() as conn:
                if against is None:
                    await serving.request(conn, version_id)
                else:
                    log.error("canary %s rejected: %s", version_id, against)
                    await serving.reject_canary(conn, version_id, against)
        except Conflict as conflict:
            log.info("canary %s: %s", version_id, conflict)


def _ack(replica: ReplicaStatus, version_id: str) -> StagedVersion | None:
    return next((staged for staged in replica.staged if staged.version_id == version_id), None)
