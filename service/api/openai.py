"""OpenAI's completions protocol as HTTP types: what is accepted, and what is answered.

A field that cannot be honoured is accepted only at the value that asks for nothing.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)

from service.inference import FinishReason, TokenScore

MAX_PROMPTS = 64
MAX_STOPS = 16
SCORING = (
    "echo with logprobs takes max_tokens 0, or 1 with temperature 0, one choice, no stop and no "
    "stream"
)


def _one_message(value: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(
            "is neither a string, a list of strings, a list of token ids, nor a list of such lists"
        ) from None


TokenId = Annotated[int, Field(ge=0)]
Prompt = Annotated[
    str | list[str] | list[TokenId] | list[list[TokenId]], WrapValidator(_one_message)
]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    include_usage: bool = False


class CompletionBody(BaseModel):
    """`POST /v1/completions`; null means the default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = "errata"
    prompt: Prompt
    max_tokens: int = Field(default=16, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=8)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: str | list[str] = []
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    user: str | None = None

    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=5)

    best_of: Literal[1] = 1
    presence_penalty: float = Field(default=0, ge=0, le=0)
    frequency_penalty: float = Field(default=0, ge=0, le=0)
    suffix: Literal[""] = ""
    logit_bias: dict[str, Any] = Field(default={}, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str]) -> str | list[str]:
        stops = [value] if isinstance(value, str) else value
        if len(stops) > MAX_STOPS:
            raise ValueError(f"has {len(stops)} strings; give at most {MAX_STOPS}")
        if not all(stops):
            raise ValueError("holds an empty string, which would end every answer at once")
        return value

    @field_validator("prompt")
    @classmethod
    def _some_prompts(cls, value: Prompt) -> Prompt:
        if len(value) == 0:
            raise ValueError("is empty; give at least one character or token")
        if isinstance(value, list) and isinstance(value[0], str | list):
            if len(value) > MAX_PROMPTS:
                raise ValueError(f"has {len(value)} prompts; give at most {MAX_PROMPTS}")
            if not all(value):
                raise ValueError("holds an empty prompt")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options.include_usage needs stream: true")
        return self

    def misfit(self, max_new_tokens: int) -> tuple[str, str] | None:
        """A field whose value does not fit the others or the service, and why; None: all fit.

        Log-probabilities are given for a prompt that is echoed: what a benchmark scores.
        """
        if self.max_tokens > max_new_tokens:
            return "max_tokens", f"is {self.max_tokens}; ask for at most {max_new_tokens}"
        if not self.echo:
            if self.logprobs is not None:
                return "logprobs", "needs echo: true; only prompts are scored"
            return None if self.max_tokens else ("max_tokens", "is 0; ask for at least 1")
        if self.logprobs is None:
            return "echo", "needs logprobs; prompts are echoed only to score them"
        fits = {
            "max_tokens": self.max_tokens <= 1,
            "temperature": self.max_tokens == 0 or self.temperature == 0,
            "n": self.n == 1,
            "stop": not self.stops(),
            "stream": not self.stream,
        }
        clashing = next((name for name, fit in fits.items() if not fit), None)
        return None if clashing is None else (clashing, f"is {getattr(self, clashing)}; {SCORING}")

    def prompts(self) -> list[str | tuple[int, ...]]:
        """One entry for each prompt asked."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = tuple(item for item in self.prompt if isinstance(item, int))
        if tokens:
            return [tokens]
        return [
            item if isinstance(item, str) else tuple(item)
            for item in self.prompt
            if not isinstance(item, int)
        ]

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Logprobs(BaseModel):
    """Of each token of `text`; null for the first one, which nothing comes before."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    @classmethod
    def of(cls, scores: Sequence[TokenScore]) -> Self:
        texts = [score.text for score in scores]
        return cls(
            tokens=texts,
            token_logprobs=[score.logprob for score in scores],
            top_logprobs=[dict(score.top) or None for score in scores],
            text_offset=list(accumulate(map(len, texts[:-1]), initial=0)),
        )


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionAnswer(BaseModel):
    """The whole answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time in seconds."""
    model: str
    """The model that answered, with its version: `errata@v12`."""
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    root: str
    """The base model's directory or hub id, as the service was given it."""
    owned_by: str = "errata"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
