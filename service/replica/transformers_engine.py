"""The engine on transformers' continuous batching: every version is a view of one base model.

A view shares each tensor of the base but the edited ones, and has a generation loop of its own, so
versions answer side by side. Knows nothing of residency rules, Ray, the store or artifacts.
"""

import asyncio
import copy
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.errors import FieldError, InvalidInput, VersionRejected
from service.inference import Chunk, CompletionRequest, FinishReason, TokenScore
from service.replica.generation import GenerationLoop, Sizes
from service.replica.sampling import Sampler
from service.replica.scoring import score
from service.replica.text import Detokenizer, StopScanner, token_text
from service.versions import BASE_VERSION


class TransformersEngine:
    """See `Engine`. Answers equal `model.generate` exactly in float32, greedy."""

    def __init__(self, model: Any, tokenizer: Any, sizes: Sizes | None = None) -> None:
        """A causal language model with SDPA attention, in evaluation mode, and its tokenizer."""
        self._sizes = sizes or Sizes()
        self._tokenizer = tokenizer
        self._eos_tokens = _eos_tokens(model)
        self._context = min(model.config.max_position_embeddings, self._sizes.kv_tokens)
        # Never run: transformers changes a model's config for the time of a forward pass, and a
        # view taken in the middle of one would keep the change.
        self._base = model.eval().requires_grad_(False)
        self._loops: dict[str, GenerationLoop] = {}
        # Views of their own: generation changes the attention of the model that it runs.
        self._scored: dict[str, Any] = {}
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self.stage(BASE_VERSION, ())

    @classmethod
    def load(cls, path: Path, sizes: Sizes, threads: int) -> Self:
        """From a Hugging Face directory: bfloat16 on a GPU, float32 on CPU with so many threads."""
        torch.set_num_threads(threads)
        gpu = torch.cuda.is_available()
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16 if gpu else torch.float32, attn_implementation="sdpa"
        )
        return cls(model.to("cuda" if gpu else "cpu"), AutoTokenizer.from_pretrained(path), sizes)

    def model(self, version_id: str) -> Any:
        """A resident version's view of the model."""
        return self._loops[version_id].model

    def stage(self, version_id: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        model = view(self._base, tensors)
        self._scored[version_id] = view(model, ())
        self._loops[version_id] = GenerationLoop(model, self._eos_tokens, self._sizes)

    async def drop(self, version_id: str) -> None:
        del self._scored[version_id]
        await self._loops.pop(version_id).close()

    async def generate(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        loop = self._loops[request.version_id]
        prompt = self._prompt(request)
        if request.prompt_logprobs is not None:
            model, top = self._scored[request.version_id], request.prompt_logprobs
            yield await asyncio.get_running_loop().run_in_executor(
                self._scoring, self._score, model, request, prompt, top
            )
            return
        detokenizer = Detokenizer(self._tokenizer, prompt)
        scanner = StopScanner(request.stop)
        tokens = 0
        reason: FinishReason = "length"
        async with aclosing(loop.tokens(prompt, request.max_tokens, self._sampler(request))) as ids:
            async for token in ids:
                tokens += 1
                if token in self._eos_tokens:
                    reason = "stop"
                    break
                if text := scanner.add(detokenizer.add(token)):
                    yield Chunk(request.version_id, text)
                if scanner.stopped:
                    break
        text = "" if scanner.stopped else scanner.add(detokenizer.flush())
        if scanner.stopped:
            reason = "stop"
        else:
            text += scanner.flush()
        yield Chunk(request.version_id, text, reason, len(prompt), tokens)

    def check(self) -> None:
        for loop in list(self._loops.values()):
            loop.check()

    async def close(self) -> None:
        for loop in list(self._loops.values()):
            await loop.close()

    def _score(self, model: Any, request: CompletionRequest, prompt: list[int], top: int) -> Chunk:
        """The whole answer to a request for scores; takes a forward pass, so not the event loop."""
        scores = score(model, prompt, max(top, 1))
        text = request.prompt if isinstance(request.prompt, str) else self._tokenizer.decode(prompt)
        reason: FinishReason = "length"
        tokens, logprobs = list(prompt), scores.logprobs
        if request.max_tokens:
            token, logprob = scores.likeliest[-1][0]
            tokens.append(token)
            logprobs.append(logprob)
            answer = Detokenizer(self._tokenizer, prompt)
            text += answer.add(token) + answer.flush()
            reason = "stop" if token in self._eos_tokens else "length"
        likeliest = [each[:top] for each in scores.likeliest[: len(tokens)]]
        return Chunk(
            request.version_id,
            text,
            reason,
            len(prompt),
            len(tokens) - len(prompt),
            tuple(map(self._token_score, tokens, logprobs, likeliest)),
        )

    def _token_score(
        self, token: int, logprob: float | None, likeliest: list[tuple[int, float]]
    ) -> TokenScore:
        top = tuple((token_text(self._tokenizer, other), value) for other, value in likeliest)
        return TokenScore(token_text(self._tokenizer, token), logprob, top)

    def _sampler(self, request: CompletionRequest) -> Sampler | None:
        if request.temperature == 0:
            return None
        return Sampler(request.temperature, request.top_p, request.seed, self._base.device)

    def _prompt(self, request: CompletionRequest) -> list[int]:
        """The prompt's token ids; raises `InvalidInput` if it and its answer do not fit."""
        if isinstance(request.prompt, str):
            prompt: list[int] = self._tokenizer(request.prompt)["input_ids"]
        else:
            prompt = list(request.prompt)
        vocabulary = self._base.config.vocab_size
        if not prompt:
            raise _invalid("prompt", "is empty; give at least one token")
        unknown = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if unknown is not None:
            raise _invalid(
                "prompt", f"holds token {unknown}; the model knows 0 to {vocabulary - 1}"
            )
        if len(prompt) >= self._context:
            raise _invalid(
                "prompt",
                f"has {len(prompt)} tokens; the model serves {self._context} tokens, prompt and "
                "answer together: shorten it",
            )
        if len(prompt) + request.max_tokens > self._context:
            raise _invalid(
                "max_tokens",
                f"is {request.max_tokens} after a prompt of {len(prompt)} tokens; the model serves "
                f"{self._context} tokens together: ask for at most {self._context - len(prompt)}",
            )
        return prompt


def view(base: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> Any:
    """A model like `base` that shares all its tensors except the ones given by parameter name.

    Raises `VersionRejected` for a name or a shape that the base does not have.
    """
    parameters = dict(base.named_parameters(remove_duplicate=False))
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _all_tensors(base)}
    for name, tensor in tensors:
        parameter = parameters.get(name)
        if parameter is None:
            raise VersionRejected(f"The base model has no parameter {name!r}.")
        if parameter.shape != tensor.shape:
            raise VersionRejected(
                f"Parameter {name!r} has shape {tuple(tensor.shape)}; "
                f"the base model's is {tuple(parameter.shape)}."
            )
        own = torch.empty_like(parameter).copy_(tensor)
        memo[id(parameter)] = torch.nn.Parameter(own, requires_grad=False)
    return copy.deepcopy(base, memo)


def _all_tensors(model: Any) -> Iterable[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _eos_tokens(model: Any) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _invalid(field: str, message: str) -> InvalidInput:
    return InvalidInput(f"{field} {message}.", (FieldError(field, message),))
