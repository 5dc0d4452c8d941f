"""Which Api or Replica a request is given to, and what becomes of it if that one's node is lost.

Runs inside each proxy and each deployment handle, in Serve's event loop. Serve pickles this module
by value.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ray.exceptions import ActorDiedError, RayError
from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.inference import CompletionRequest

PROBE_S = 2.0
"""How often one that Serve no longer lists is asked whether it lives, while it has to answer."""
RESIDENT = "resident"
"""In a replica's routing statistics: the versions it holds and would answer with at once."""


class EndingRouter(RequestRouter):  # type: ignore[misc]  # Ray is not typed
    """Ends what was given to one that is lost: whoever waits for it gets a cancellation.

    Nobody tells gRPC that a node was cut off: for what was accepted there it would wait minutes.
    """

    def initialize_state(self, **_: Any) -> None:
        """Called by Serve before the first request."""
        self._dead: set[ReplicaID] = set()
        """Found dead here; Serve may go on to list them for some seconds."""
        self._answers: defaultdict[ReplicaID, set[Any]] = defaultdict(set)
        """What each has accepted and not ended."""
        self._following: set[asyncio.Task[None]] = set()

    def on_request_routed(self, _: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a request was accepted."""
        answers = self._answers[replica_id]
        answers.add(result)
        result.add_done_callback(lambda _: answers.discard(result))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas, or what they say of themselves, have changed."""
        listed = {one.replica_id for one in replicas}
        self._dead &= listed
        for gone in self.curr_replicas.keys() - listed:
            following = self._event_loop.create_task(self._follow(self.curr_replicas[gone]))
            self._following.add(following)
            following.add_done_callback(self._following.discard)
        super().update_replicas([one for one in replicas if one.replica_id not in self._dead])

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a request or a probe failed so."""
        self._dead.add(replica_id)
        super().on_replica_actor_died(replica_id)
        self._end(replica_id)

    async def _follow(self, gone: RunningReplica) -> None:
        """One that Serve no longer lists answers what it was given first, unless it is lost."""
        await asyncio.sleep(PROBE_S)  # It may yet accept what was sent before.
        while self._answers[gone.replica_id]:
            try:
                await gone.get_queue_len(deadline_s=PROBE_S)
            except ActorDiedError:
                break
            except RayError:
                pass  # Not reached: Ray does not know yet whether it lives.
            await asyncio.sleep(PROBE_S)
        self._end(gone.replica_id)

    def _end(self, replica_id: ReplicaID) -> None:
        for result in list(self._answers.pop(replica_id, ())):
            result.cancel()


class ApiRouter(EndingRouter, PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]  # as above
    """An Api on the proxy's own node if there is one; of two the less busy one."""


class VersionRouter(EndingRouter):
    """Requests are given to replicas in the order below; their queue lengths decide within it.

    1. those that hold the version; 2. the others; 3. those that were tried before, which answer so
    at once: the caller then knows that there is no other.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Two replicas of each rank, at random; Serve takes the first one that is not full."""
        if pending_request is None:
            return [_two(candidate_replicas)]
        # Serve spins, unless told to wait between two rounds in which all were full.
        pending_request.routing_context.should_backoff = True
        version_id, tried = _wanted(pending_request.args)
        untried = [one for one in candidate_replicas if one.replica_id.unique_id not in tried]
        holding = [one for one in untried if version_id in one.routing_stats.get(RESIDENT, ())]
        others = [one for one in untried if one not in holding]
        return [_two(holding), _two(others)] if untried else [_two(candidate_replicas)]


def _wanted(arguments: Sequence[Any]) -> tuple[str | None, frozenset[str]]:
    """The version that a call is for, if any, and the ids of the replicas that were tried."""
    match arguments:
        case [CompletionRequest() as request, frozenset() as tried]:
            return request.version_id, tried
    return None, frozenset()


def _two(replicas: Sequence[RunningReplica]) -> list[RunningReplica]:
    return random.sample(replicas, min(2, len(replicas)))
