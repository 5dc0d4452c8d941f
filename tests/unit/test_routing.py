"""Which replicas the router puts forward, in which order, and what it ends of one that is lost."""

import asyncio
from collections.abc import Sequence

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import PendingRequest, ReplicaID

from service import routing
from service.inference import CompletionRequest
from service.routing import RESIDENT, VersionRouter

pytestmark = pytest.mark.anyio

DEPLOYMENT = DeploymentID("Replica")


class Listed:
    """A replica as Serve lists it."""

    max_ongoing_requests = 1

    def __init__(self, name: str, *resident: str) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.routing_stats = {RESIDENT: list(resident)} if resident else {}
        self.probed: asyncio.Queue[None] = asyncio.Queue()
        self.fails: Exception | None = None

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.probed.put_nowait(None)
        if self.fails:
            raise self.fails
        return 0


@pytest.fixture
def router() -> VersionRouter:
    made = VersionRouter(DEPLOYMENT, DeploymentHandleSource.UNKNOWN)
    made.initialize_state()
    return made


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "PROBE_S", 0.01)


async def ranks(router: VersionRouter, replicas: Sequence[Listed], *tried: str) -> list[set[str]]:
    """Names, as they are put forward for a query of v1."""
    pending = PendingRequest([CompletionRequest("v1", "a"), frozenset(tried)], {}, None)
    found = await router.choose_replicas(list(replicas), pending)
    assert pending.routing_context.should_backoff
    return [{one.replica_id.unique_id for one in rank} for rank in found]


async def test_who_holds_the_version_comes_first(router: VersionRouter) -> None:
    replicas = [Listed("new"), Listed("other", "v0", "v2"), Listed("holder", "v0", "v1")]
    assert await ranks(router, replicas) == [{"holder"}, {"new", "other"}]
    assert await ranks(router, replicas, "holder") == [set(), {"new", "other"}]
    assert await ranks(router, replicas, "holder", "new") == [set(), {"other"}]


async def test_who_was_tried_comes_only_when_all_were(router: VersionRouter) -> None:
    replicas = [Listed("a", "v1"), Listed("b")]
    assert await ranks(router, replicas, "a", "b", "gone") == [{"a", "b"}]


async def test_two_of_many(router: VersionRouter) -> None:
    holders = [Listed(f"holder {number}", "v1") for number in range(9)]
    seen = [await ranks(router, holders) for _ in range(100)]
    assert {len(first) for first, _ in seen} == {2}
    assert set.union(*(first for first, _ in seen)) == {one.replica_id.unique_id for one in holders}


async def test_a_call_without_a_version(router: VersionRouter) -> None:
    pending = PendingRequest([], {}, None)
    one = Listed("a")
    assert one in (await router.choose_replicas([one], pending))[-1]
    assert len(await router.choose_replicas([Listed("a"), Listed("b")])) == 1


async def test_the_dead_do_not_come_back(router: VersionRouter) -> None:
    """Serve goes on to list one for some seconds, whenever anything else changes."""
    dead, alive = Listed("dead", "v1"), Listed("alive")
    router.update_replicas([dead, alive])
    router.on_replica_actor_died(dead.replica_id)
    router.update_replicas([dead, alive])
    assert [*router.curr_replicas.values()] == [alive]
    await asyncio.sleep(0)


async def given(router: VersionRouter, replica: Listed) -> asyncio.Future[str]:
    """What `replica` has accepted and not answered, when Serve lists it no more."""
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    router.update_replicas([replica])
    await replica.probed.get()
    router.on_request_routed(PendingRequest([], {}, None), replica.replica_id, answer)
    router.update_replicas([])
    return answer


async def test_what_a_lost_one_was_given_is_ended(router: VersionRouter, often: None) -> None:
    lost = Listed("lost")
    lost.fails = ActorUnavailableError("not reached", None)
    answer = await given(router, lost)
    for _ in range(3):
        await lost.probed.get()
    assert not answer.done()
    lost.fails = ActorDiedError()
    with pytest.raises(asyncio.CancelledError):
        await answer


async def test_one_that_drains_answers_what_it_was_given(
    router: VersionRouter, often: None
) -> None:
    draining = Listed("draining")
    answer = await given(router, draining)
    for _ in range(3):
        await draining.probed.get()
    assert not answer.done()
    answer.set_result("Paris")
    [following] = router._following
    await following


async def test_what_one_found_dead_was_given_is_ended_at_once(router: VersionRouter) -> None:
    dead = Listed("dead")
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    router.update_replicas([dead])
    router.on_request_routed(PendingRequest([], {}, None), dead.replica_id, answer)
    router.on_replica_actor_died(dead.replica_id)
    assert answer.cancelled()
