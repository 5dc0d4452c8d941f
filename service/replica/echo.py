"""An engine without a model, for tests: it answers with its version and the prompt's words."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING

from service.inference import Chunk, CompletionRequest
from service.versions import BASE_VERSION

if TYPE_CHECKING:
    import torch


class EchoEngine:
    """See `Engine`. One word is one token; `hold` keeps every answer from going on."""

    def __init__(self) -> None:
        self.staged: dict[str, dict[str, torch.Tensor]] = {BASE_VERSION: {}}
        self.stagings: list[str] = []
        self.hold = asyncio.Event()
        self.hold.set()

    def stage(self, version_id: str, tensors: "Iterable[tuple[str, torch.Tensor]]") -> None:
        self.stagings.append(version_id)
        self.staged[version_id] = dict(tensors)

    async def drop(self, version_id: str) -> None:
        del self.staged[version_id]

    async def generate(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        version_id = request.version_id
        assert version_id in self.staged, f"{version_id} is not resident"
        prompt = request.prompt
        said = prompt.split() if isinstance(prompt, str) else [str(token) for token in prompt]
        words = [version_id, *said][: request.max_tokens]
        for word in words:
            await self.hold.wait()
            yield Chunk(version_id, f" {word}")
        yield Chunk(version_id, "", "stop", len(said), len(words))

    def check(self) -> None:
        """It never ends by itself."""

    async def close(self) -> None:
        self.staged.clear()
