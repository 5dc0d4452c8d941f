"""`Inference` over a Serve handle: how other processes reach the replicas.

Turns what Ray raises into the service's own errors. Light: brings neither torch nor transformers.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray.exceptions import RayActorError, WorkerCrashedError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from service.errors import ErrataError, Unavailable
from service.inference import Chunk, Completion, CompletionRequest

ATTEMPTS = 2


class ReplicaDied(Unavailable):
    """The replica ended while it was answering."""


class ServeInference:
    """See `Inference`. A request whose replica died before answering is given to another, once."""

    def __init__(self, handle: DeploymentHandle, timeout_s: float = 120.0) -> None:
        """`timeout_s` bounds the wait for a whole answer, or for the next piece of a stream."""
        self._handle = handle
        self._timeout_s = timeout_s

    async def complete(self, request: CompletionRequest) -> Completion:
        for _ in range(ATTEMPTS - 1):
            try:
                return await self._complete_once(request)
            except ReplicaDied:
                continue
        return await self._complete_once(request)

    async def stream(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        for attempt in range(1, ATTEMPTS + 1):
            begun = False
            try:
                async with aclosing(self._stream_once(request)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                return
            except ReplicaDied:
                if begun or attempt == ATTEMPTS:
                    raise

    async def _complete_once(self, request: CompletionRequest) -> Completion:
        response = self._handle.complete.remote(request)
        done = False
        try:
            completion: Completion = await self._within(response)
            done = True
            return completion
        finally:
            if not done:
                response.cancel()

    async def _stream_once(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        response = self._handle.options(stream=True).stream.remote(request)
        done = False
        try:
            while True:
                try:
                    chunk = await self._within(anext(response))
                except StopAsyncIteration:
                    done = True
                    return
                yield chunk
        finally:
            if not done:
                response.cancel()

    async def _within(self, awaitable: Any) -> Any:
        """The awaited value, in time; what went wrong is raised as the service's own error."""
        try:
            async with asyncio.timeout(self._timeout_s):
                value = await awaitable
        except TimeoutError as error:
            raise Unavailable(
                f"No replica answered within {self._timeout_s:g} s. Try again."
            ) from error
        except (RayActorError, WorkerCrashedError) as error:
            raise ReplicaDied("The replica that was answering ended. Try again.") from error
        except RayServeException as error:
            raise Unavailable(f"No replica can take the request: {error}. Try again.") from error
        if isinstance(value, ErrataError):
            raise value
        return value
