"""What a replica asks of an inference engine; nothing of residency rules, Ray or the store."""

from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING, Protocol

from service.inference import Chunk, CompletionRequest

if TYPE_CHECKING:
    import torch


class Engine(Protocol):
    """One base model and the versions of it that are in memory.

    `v0`, the base, is always there. The bank decides which other versions are, and never asks for
    one that is not staged nor drops one that has requests in flight. Requests of all versions may
    run in one batch, each with its own version's parameters. All methods but `stage` are called on
    one event loop.
    """

    def stage(self, version_id: str, tensors: "Iterable[tuple[str, torch.Tensor]]") -> None:
        """Bring a version into memory: the base with these parameters in place of its own.

        Called on a worker thread; generation goes on. The tensors are the engine's from then on.
        Raises `VersionRejected` for a parameter that the base does not have, that has another
        shape there or is not finite, or that the engine cannot run beside other versions' own.
        """

    async def drop(self, version_id: str) -> None:
        """Give back what a version holds."""

    def generate(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        """Answer with `request.version_id`, from the first token to the last.

        The last chunk carries the finish reason, the token counts and the scores, if asked for.
        Closing the iterator frees the request. Raises `InvalidInput` for a prompt that does not
        fit, `Unavailable` if generation failed.
        """

    def check(self) -> None:
        """Raise `Unavailable` if the engine cannot generate any more and must be restarted."""

    async def close(self) -> None:
        """End all generation and give everything back."""
