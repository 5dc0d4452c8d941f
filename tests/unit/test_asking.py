"""What becomes of a query when the replica that was asked does not answer it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from grpc import RpcError
from ray.exceptions import ActorUnavailableError

from service.errors import Unavailable, VersionUnavailable
from service.inference import Chunk, Completion, CompletionRequest
from service.replica.client import DEATHS, Refused, ReplicaDied, ServeInference

pytestmark = pytest.mark.anyio

QUERY = CompletionRequest("v1", "The capital of France is")
PARIS = Completion("v1", "Paris", "stop", 5, 1)
LOST = asyncio.CancelledError()
"""What whoever waits is told when the router has ended the call."""

Outcome = Chunk | Completion | BaseException | None


class Response:
    """Tells each of `outcomes`; None: never anything."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self._outcomes = iter(outcomes)
        self.waited_for = asyncio.Event()
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        told = next(self._outcomes, StopAsyncIteration())
        if told is None:
            self.waited_for.set()
            await asyncio.Event().wait()
        if isinstance(told, BaseException) and not isinstance(told, Refused):
            raise told
        return told

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Serve's, of replicas that respond so, one after the other."""

    def __init__(self, *responses: list[Outcome]) -> None:
        self.responses = [Response(one) for one in responses]
        self._next: Iterator[Response] = iter(self.responses)
        self.complete = self.stream = self

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, *_: Any) -> Response:
        return next(self._next)


@pytest.mark.parametrize(
    "failure", [LOST, RpcError(), ActorUnavailableError("gone", None)], ids=["lost", "rpc", "died"]
)
async def test_another_one_is_asked(failure: BaseException) -> None:
    handle = Handle([failure], [PARIS])
    assert await ServeInference(handle).complete(QUERY) == PARIS
    assert [one.cancelled for one in handle.responses] == [True, False]


async def test_once_all_have_refused_their_reason_is_told() -> None:
    refusals = [Refused.by(one, Unavailable(f"{one} is full.")) for one in ("a", "b", "a")]
    with pytest.raises(VersionUnavailable, match="v1 now: b is full"):
        await ServeInference(Handle(*([one] for one in refusals))).complete(QUERY)


async def test_a_query_under_which_they_die_is_given_up() -> None:
    with pytest.raises(ReplicaDied):
        await ServeInference(Handle(*[[LOST]] * DEATHS)).complete(QUERY)


async def test_a_stream_that_has_begun_is_not_begun_again() -> None:
    begun = Chunk("v1", "Pa")
    told = ServeInference(Handle([begun, LOST], [begun])).stream(QUERY)
    assert await anext(told) == begun
    with pytest.raises(ReplicaDied):
        await anext(told)


async def test_who_no_longer_waits_ends_the_call() -> None:
    handle = Handle([None])
    [response] = handle.responses
    asking = asyncio.create_task(ServeInference(handle).complete(QUERY))
    await response.waited_for.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert response.cancelled
