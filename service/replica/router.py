"""Which replica a request is given to: one that holds its version, of two the less busy one.

Runs inside each deployment handle, in Serve's event loop. Serve pickles this module by value.
"""

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.inference import CompletionRequest

RESIDENT = "resident"
"""In a replica's routing statistics: the versions it holds and would answer with at once."""


class VersionRouter(RequestRouter):  # type: ignore[misc]  # Ray is not typed
    """Requests are given to replicas in the order below; their queue lengths decide within it.

    1. those that hold the version; 2. the others; 3. those that were tried before, which answer so
    at once: the caller then knows that there is no other.
    """

    def initialize_state(self, **_: Any) -> None:
        """Called by Serve before the first request."""
        self._dead: set[ReplicaID] = set()
        """Found dead here; Serve may go on to list them for some seconds."""

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

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas, or what they say of themselves, have changed."""
        self._dead &= {one.replica_id for one in replicas}
        super().update_replicas([one for one in replicas if one.replica_id not in self._dead])

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a request failed so."""
        self._dead.add(replica_id)
        super().on_replica_actor_died(replica_id)


def _wanted(arguments: Sequence[Any]) -> tuple[str | None, frozenset[str]]:
    """The version that a call is for, if any, and the ids of the replicas that were tried."""
    match arguments:
        case [CompletionRequest() as request, frozenset() as tried]:
            return request.version_id, tried
    return None, frozenset()


def _two(replicas: Sequence[RunningReplica]) -> list[RunningReplica]:
    return random.sample(replicas, min(2, len(replicas)))
