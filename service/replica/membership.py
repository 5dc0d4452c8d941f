"""A replica's part in rollouts: its row, its heartbeat, and staging what the store asks for.

Knows versions by the bank and the rest of the service by the store, nothing of engines or Ray.
"""

import asyncio
import logging
from datetime import UTC, datetime

from service.errors import Conflict, NotFound, Unavailable, VersionRejected
from service.replica.bank import VersionBank
from service.store import replicas, serving
from service.store.database import Database
from service.versions import ReplicaState, Serving

log = logging.getLogger(__name__)

POLL_S = 1.0
RETRY_S = 0.2


class Fenced(Exception):
    """A rollout went on without this replica; it must start again."""


class Membership:
    """Joined once, then kept up by `run` until `leave`.

    While the database is away, queries go on and this waits for it.
    """

    def __init__(
        self,
        replica_id: str,
        database: Database,
        bank: VersionBank,
        heartbeat_s: float,
        cluster: str = "",
    ) -> None:
        """`cluster` names the Ray cluster that runs the replica."""
        self._id = replica_id
        self._cluster = cluster
        self._database = database
        self._bank = bank
        self._interval_s = min(heartbeat_s, POLL_S)
        self._changed = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._staging: asyncio.Task[None] | None = None
        self._staging_key: tuple[str, datetime] | None = None
        self._pinned_at = datetime.min.replace(tzinfo=UTC)
        """When what is pinned was written, by the database's clock."""

    async def join(self) -> None:
        """Returns once this replica holds what is committed and being staged, and is counted.

        It waits for a database or a version store that is away: Serve starts one that failed
        anew, each time later. Raises what else the bank raises if the committed version cannot be
        loaded.
        """
        while True:
            try:
                if await self._try_join():
                    return
            except Unavailable as error:
                log.warning("waiting to join: %s", error)
            await asyncio.sleep(RETRY_S)

    async def run(self) -> None:
        """Heartbeats, follows the serving row, stages; called once, ends only by an error.

        Raises a group with `Fenced` once a rollout has gone on without this replica.
        """
        async with self._tasks:
            self._tasks.create_task(self._listen())
            self._tasks.create_task(self._beat())

    async def leave(self) -> None:
        """Take the row away: no rollout waits for this replica any more."""
        async with self._database.transaction() as conn:
            await replicas.leave(conn, self._id)

    async def _try_join(self) -> bool:
        async with self._database.transaction() as conn:
            present = await serving.current(conn)
        await self._pin(present)
        await self._bank.ensure(present.version_id)
        refused = [one for one in present.wanted[1:] if await self._refuses(one)]
        async with self._database.transaction() as conn:
            return await replicas.join(
                conn, self._id, self._bank.resident, refused, cluster=self._cluster
            )

    async def _refuses(self, version_id: str) -> bool:
        """Whether a version that is not committed fails verification; it is loaded if not."""
        try:
            await self._bank.ensure(version_id)
        except (NotFound, VersionRejected) as error:
            log.warning("joining without %s: %s", version_id, error)
            return True
        except Unavailable as error:
            log.warning("waiting for %s or for its rollout to end: %s", version_id, error)
        return False

    async def _pin(self, present: Serving) -> None:
        """The parent too, where it is still there: it is what is gone back to."""
        if present.updated_at < self._pinned_at:
            return
        self._pinned_at = present.updated_at
        parent = () if present.parent_id is None else (present.parent_id,)
        await self._bank.pin((*present.wanted, *parent))

    async def _listen(self) -> None:
        """What is announced needs no look at the database, which queries would wait for."""
        async for payload in self._database.listen(serving.CHANNEL):
            present = serving.announced(payload)
            await self._pin(present)
            if not await self._acknowledged(present):
                self._changed.set()

    async def _acknowledged(self, present: Serving) -> bool:
        """Whether nothing is to be staged, or only what is resident: said so at once."""
        if present.staging_id is None:
            return True
        digest = self._bank.digest(present.staging_id)
        if digest is None:
            return False
        try:
            async with self._database.transaction() as conn:
                await replicas.acknowledge(conn, self._id, present.staging_id, digest)
        except (Conflict, Unavailable) as error:
            log.warning("staging %s: %s", present.staging_id, error)
            return False
        self._turn_to(present)
        return True

    async def _beat(self) -> None:
        while True:
            try:
                await self._follow()
            except Unavailable as error:
                log.warning("no heartbeat: %s", error)
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._changed.wait()
            except TimeoutError:
                continue
            self._changed.clear()

    async def _follow(self) -> None:
        """One heartbeat; then see whether there is something to stage."""
        async with self._database.transaction() as conn:
            state = await replicas.heartbeat(conn, self._id, self._bank.resident)
            present = await serving.current(conn)
        if state is ReplicaState.FENCED:
            raise Fenced(f"Replica {self._id} did not stage in time and was fenced.")
        if state is None:
            log.warning("replica %s was forgotten while it was away; joining again", self._id)
            self._staging_key = None
            await self._try_join()
            return
        await self._pin(present)
        self._follow_staging(present)

    def _follow_staging(self, present: Serving) -> None:
        """Stages beside the heartbeats: once for each time that a version is put up for staging."""
        if _staging_key(present) == self._staging_key:
            return
        self._turn_to(present)
        if present.staging_id is not None:
            self._staging = self._tasks.create_task(self._stage(present.staging_id))

    def _turn_to(self, present: Serving) -> None:
        """What was being staged before is staged no more."""
        if self._staging is not None:
            self._staging.cancel()
        self._staging_key = _staging_key(present)

    async def _stage(self, version_id: str) -> None:
        """Load and acknowledge; a version that fails is reported, an outage is waited out."""
        while True:
            try:
                digest, problem = await self._load(version_id)
                async with self._database.transaction() as conn:
                    await replicas.acknowledge(
                        conn, self._id, version_id, digest=digest, error=problem
                    )
            except (Conflict, Unavailable) as error:
                log.warning("staging %s: %s", version_id, error)
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _load(self, version_id: str) -> tuple[str | None, str | None]:
        """Digest or error text, for the acknowledgement."""
        try:
            return await self._bank.ensure(version_id), None
        except (NotFound, VersionRejected) as error:
            return None, str(error)


def _staging_key(present: Serving) -> tuple[str, datetime] | None:
    """Changes each time that a version is put up for staging, the same one again included."""
    return None if present.staging_id is None else (present.staging_id, present.updated_at)
