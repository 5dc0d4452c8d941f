"""The engine on transformers' continuous batching: all versions in one batch over one KV cache.

Versions share each tensor of the base but the edited ones. Knows nothing of residency rules, Ray,
the store or artifacts.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.errors import FieldError, InvalidInput
from service.inference import Chunk, CompletionRequest, FinishReason, TokenScore
from service.replica.generation import GenerationLoop, Sizes
from service.replica.row_layout import row_layouts
from service.replica.sampling import Sampler
from service.replica.scoring import score
from service.replica.text import Detokenizer, StopScanner, token_text
from service.replica.versioned import ResidentVersion, VersionedModel, resident, view
from service.versions import BASE_VERSION

LEAST_TEMPERATURE = 1e-5
"""Below it an answer is greedy; the logits divided by less are not finite."""


class TransformersEngine:
    """See `Engine`. Answers equal `model.generate` exactly in float32, greedy."""

    def __init__(self, model: Any, tokenizer: Any, sizes: Sizes | None = None) -> None:
        """A causal language model with SDPA attention, in evaluation mode, and its tokenizer."""
        sizes = sizes or Sizes()
        self._tokenizer = tokenizer
        self._eos_tokens = _eos_tokens(model)
        self._context = min(model.config.max_position_embeddings, sizes.kv_tokens)
        # Never run: transformers changes a model's config for the time of a forward pass, and a
        # copy taken in the middle of one would keep the change.
        self._base = model.eval().requires_grad_(False)
        generating, self._scored = VersionedModel(self._base), VersionedModel(self._base)
        self._layouts = row_layouts(self._scored.model)
        self._models = (generating, self._scored)
        self._loop = GenerationLoop(generating, self._eos_tokens, sizes)
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self._versions: dict[str, ResidentVersion] = {}
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
        """The model as a resident version has it, sharing the version's tensors and the base's."""
        return view(self._base, self._versions[version_id].tensors)

    def stage(self, version_id: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        version = resident(self._base, self._layouts, version_id, tensors)
        for model in self._models:
            model.admit(version, self._layouts)
        self._versions[version_id] = version

    async def drop(self, version_id: str) -> None:
        del self._versions[version_id]

    async def generate(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        version = self._versions[request.version_id]
        prompt = self._prompt(request)
        if request.prompt_logprobs is not None:
            yield await asyncio.get_running_loop().run_in_executor(
                self._scoring, self._score, version, request, prompt, request.prompt_logprobs
            )
            return
        detokenizer = Detokenizer(self._tokenizer, prompt)
        scanner = StopScanner(request.stop)
        tokens = 0
        reason: FinishReason = "length"
        answer = self._loop.tokens(version, prompt, request.max_tokens, self._sampler(request))
        async with aclosing(answer) as ids:
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
        self._loop.check()

    async def close(self) -> None:
        await self._loop.close()

    def _score(
        self, version: ResidentVersion, request: CompletionRequest, prompt: list[int], top: int
    ) -> Chunk:
        """The whole answer to a request for scores; takes a forward pass, so not the event loop."""
        self._scored.rows.lay_out([(version, len(prompt), True)])
        scores = score(self._scored.model, prompt, max(top, 1))
        self._scored.rows.clear()
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
        if request.temperature < LEAST_TEMPERATURE:
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


def _eos_tokens(model: Any) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _invalid(field: str, message: str) -> InvalidInput:
    return InvalidInput(f"{field} {message}.", (FieldError(field, message),))
