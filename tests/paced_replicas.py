"""What tests put behind Ray Serve: an engine that takes its time, a caller with many queries."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray.serve.handle import DeploymentHandle

from service.inference import Chunk, CompletionRequest
from service.replica.client import ServeInference
from service.replica.echo import EchoEngine
from service.settings import Settings

WORD_S = 0.02


class PacedEngine(EchoEngine):
    """See `EchoEngine`; each piece of an answer takes `WORD_S`."""

    async def generate(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                await asyncio.sleep(WORD_S)
                yield chunk


def load(_settings: Settings, _base_fingerprint: str) -> PacedEngine:
    """What a replica is given to load its engine with."""
    return PacedEngine()


class Asker:
    """A deployment that answers one call with the answers to many, as the api does."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._inference = ServeInference(replicas)

    async def ask(self, requests: list[CompletionRequest]) -> list[str]:
        answers = await asyncio.gather(*map(self._inference.complete, requests))
        return [answer.text for answer in answers]
