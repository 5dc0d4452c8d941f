"""What the api and the coordinator ask of the replicas, and the protocol. No I/O."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class CompletionRequest:
    """One prompt for one version; `version_id` was chosen at admission and is never changed."""

    version_id: str
    prompt: str | tuple[int, ...]
    max_tokens: int = 16
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    prompt_logprobs: int | None = None
    """Score the prompt instead of only reading it, with so many of the likeliest tokens at each
    place; its text is part of the answer's, and `max_tokens` is 0 or 1, greedy."""


@dataclass(frozen=True)
class TokenScore:
    """A token of a scored text; logarithms are natural."""

    text: str
    logprob: float | None
    """None for the first one, which nothing comes before."""
    top: tuple[tuple[str, float], ...]
    """The likeliest tokens in its place, likeliest first."""


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer; the last one carries the finish reason and the token counts."""

    version_id: str
    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer, computed by `version_id` from its first token to its last."""

    version_id: str
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    scores: tuple[TokenScore, ...] = ()
    """Of the prompt's tokens and the answer's, where `prompt_logprobs` asked for them."""


class Inference(Protocol):
    """The replicas as their callers see them.

    Raises `NotFound` for a version that does not exist, `Unavailable` for one that cannot be
    staged now, `InvalidInput` for a prompt that does not fit the model's context.
    """

    async def complete(self, request: CompletionRequest) -> Completion: ...

    def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]: ...
