"""`Inference` over a Serve handle: how other processes reach the replicas.

Turns what Ray raises into the service's own errors, and tries around a replica that cannot answer.
Light: brings neither torch nor transformers.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context
from typing import Any
from uuid import uuid4

from grpc import RpcError
from ray.exceptions import RayActorError
from ray.serve.context import _RequestContext, _serve_request_context
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from service import metrics
from service.errors import ErrataError, Unavailable, VersionUnavailable
from service.inference import Chunk, Completion, CompletionRequest

ANSWER_S = 120.0
"""A whole answer is waited for so long; a replica that must be started first takes some 20 s."""
PIECE_S = 60.0
"""A stream's first piece, and each next one, is waited for so long."""
DEATHS = 3
"""A request is given up when so many replicas have ended under it."""


class ReplicaDied(Unavailable):
    """The replica ended while it was answering."""


class Refused(VersionUnavailable):
    """A replica cannot answer now and has told nothing yet; another one may be asked."""

    replica_id: str

    @classmethod
    def by(cls, replica_id: str, why: Unavailable) -> "Refused":
        refused = cls(why.detail)
        refused.replica_id = replica_id
        return refused


class ServeInference:
    """See `Inference`.

    A replica that cannot hold the version, or dies before the first piece of the answer, is tried
    around; `VersionUnavailable` once all replicas were asked.
    """

    def __init__(
        self, handle: DeploymentHandle, answer_s: float = ANSWER_S, piece_s: float = PIECE_S
    ) -> None:
        # By gRPC: a replica that answers by Ray's own calls waits, with all it does, until what it
        # sent is acknowledged, and a node that was cut off acknowledges nothing. Streams, as the
        # router is told of any other call only when it was answered.
        self._calls = handle.options(stream=True, _by_reference=False)
        self._answer_s = answer_s
        self._piece_s = piece_s

    async def complete(self, request: CompletionRequest) -> Completion:
        attempts = Attempts(request.version_id)
        until = _now() + self._answer_s
        with metrics.query(request.version_id):
            while True:
                try:
                    call = self._calls.complete.remote
                    told = _told(call, request, attempts.tried, until, self._answer_s)
                    completion: Completion
                    [completion] = [one async for one in told]
                    return completion
                except (Refused, ReplicaDied) as error:
                    attempts.failed(error)

    async def stream(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        attempts = Attempts(request.version_id)
        until = _now() + self._piece_s
        begun = False
        with metrics.query(request.version_id):
            while True:
                try:
                    call = self._calls.stream.remote
                    told = _told(call, request, attempts.tried, until, self._piece_s)
                    async with aclosing(told):
                        async for chunk in told:
                            begun = True
                            yield chunk
                    return
                except (Refused, ReplicaDied) as error:
                    if begun:
                        raise
                    attempts.failed(error)


class Attempts:
    """The replicas that a request was given to in vain."""

    def __init__(self, version_id: str) -> None:
        self._version_id = version_id
        self._why = ""
        self._deaths = 0
        self.tried: frozenset[str] = frozenset()
        """Ids of those that refused; one that died is not given requests any more."""

    def failed(self, error: Refused | ReplicaDied) -> None:
        """Takes note, or raises what to tell the client once there is nobody left to ask."""
        if isinstance(error, ReplicaDied):
            self._deaths += 1
            if self._deaths == DEATHS:
                raise error
            metrics.retried("died")
            return
        if error.replica_id in self.tried:
            raise VersionUnavailable(
                f"No replica can answer with {self._version_id} now: {self._why}"
            ) from error
        self._why = error.detail
        self.tried |= {error.replica_id}
        metrics.retried("refused")


async def _told(
    call: Any, request: CompletionRequest, tried: frozenset[str], until: float, wait_s: float
) -> AsyncGenerator[Any]:
    """What a replica tells, piece by piece: the first one by `until`, each next one in `wait_s`."""
    response = Context().run(_apart, call, request, tried)
    done = False
    try:
        while True:
            try:
                value = await _value(anext(response), until, wait_s)
            except StopAsyncIteration:
                done = True
                return
            yield value
            until = _now() + wait_s
    finally:
        if not done:
            response.cancel()


def _apart(call: Any, *arguments: Any) -> Any:
    """Serve tells the calls that one HTTP request makes apart by an id that is the request's."""
    _serve_request_context.set(_RequestContext(_internal_request_id=uuid4().hex))
    return call(*arguments)


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _value(awaitable: Any, until: float, waited_s: float) -> Any:
    """The awaited value, in time; what went wrong is raised as the service's own error."""
    try:
        async with asyncio.timeout_at(until):
            value = await awaitable
    except TimeoutError as error:
        raise Unavailable(
            f"No replica answered within {waited_s:g} s. One may still be starting, or all have "
            "too much to do: try again soon. If it goes on, raise replicas_min or replicas_max."
        ) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ReplicaDied("The replica that was answering was lost. Try again.") from error
    except (RayActorError, RpcError) as error:
        raise ReplicaDied("The replica that was answering ended. Try again.") from error
    except RayServeException as error:
        raise Unavailable(f"No replica can take the request: {error}. Try again.") from error
    if isinstance(value, ErrataError):
        raise value
    return value
