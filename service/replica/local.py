"""`Inference` in this process: an engine and its bank. Knows nothing of Serve or the store."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from service import metrics
from service.inference import Chunk, Completion, CompletionRequest
from service.replica.bank import VersionBank
from service.replica.engine import Engine


class LocalInference:
    """See `Inference`; also raises `VersionRejected` for a version that fails verification."""

    def __init__(self, engine: Engine, bank: VersionBank) -> None:
        self._engine = engine
        self._bank = bank

    async def complete(self, request: CompletionRequest) -> Completion:
        text = ""
        async for chunk in self.stream(request):
            text += chunk.text
            last = chunk
        assert last.finish_reason is not None, "the last chunk carries the finish reason"
        return Completion(
            last.version_id,
            text,
            last.finish_reason,
            last.prompt_tokens,
            last.completion_tokens,
            last.scores,
        )

    async def stream(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        pace = metrics.Pace()
        async with (
            self._bank.use(request.version_id),
            aclosing(self._engine.generate(request)) as chunks,
        ):
            async for chunk in chunks:
                pace.piece()
                yield chunk
        metrics.answered(chunk.version_id, chunk.prompt_tokens, chunk.completion_tokens)
