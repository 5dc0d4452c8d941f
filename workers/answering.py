"""Greedy answers of a model in this process, many prompts at a time.

For searches over weights, where no service answers; knows no edits and no verdicts.
Shapes: B rows, T tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.errors import TrainingFailed
from workers.evaluation import MAX_NEW_TOKENS

BATCH_TOKENS = 16_384
"""Of prompts and answers in a batch: bounds its key-value cache."""


class Answerer:
    """A model with its tokenizer; asks whatever weights the model has at the time."""

    def __init__(self, model: Any, tokenizer: Any, context: int) -> None:
        """`context` is the longest prompt with its answer, in tokens."""
        self._model, self._tokenizer, self._context = model, tokenizer, context
        self._eos = _eos_tokens(model, tokenizer)
        self._texts: dict[int, str] = {}

    def answers(self, prompts: Iterable[str], stop: Sequence[str]) -> dict[str, str]:
        """Each prompt's greedy answer: to EOS, the first token that has a text of `stop`, or
        `MAX_NEW_TOKENS`.

        Raises `TrainingFailed` for a prompt that leaves no room for an answer.
        """
        ids = {prompt: self._encode(prompt) for prompt in prompts}
        found: dict[str, str] = {}
        for batch in _batches(ids):
            tokens = self._continue([ids[prompt] for prompt in batch], stop)
            texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
            found |= zip(batch, texts, strict=True)
        return found

    def _encode(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(prompt)
        if len(ids) > 1 and ids[-1] in self._eos:
            ids = ids[:-1]
        if not 0 < len(ids) < self._context:
            raise TrainingFailed(
                f"the prompt {prompt!r} has {len(ids)} tokens; with an answer it must have "
                f"2 to {self._context}"
            )
        return ids

    @torch.no_grad()
    def _continue(self, prompts: Sequence[list[int]], stop: Sequence[str]) -> list[list[int]]:
        """New tokens of each row; a row leaves the batch as soon as it has ended."""
        from transformers import DynamicCache

        answers: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        cache = DynamicCache(config=self._model.config)
        ids_BT, mask_BT = _left_padded(prompts, self._model.device)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        for new in range(1, MAX_NEW_TOKENS + 1):
            logits = self._model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            tokens_B = logits[:, -1].argmax(-1)
            for row, token in zip(going, tokens := tokens_B.tolist(), strict=True):
                answers[row].append(token)
            left = [
                place
                for place, (row, token) in enumerate(zip(going, tokens, strict=True))
                if not self._ends(token, stop) and len(prompts[row]) + new < self._context
            ]
            if not left:
                break
            if len(left) < len(going):
                kept = torch.tensor(left, device=ids_BT.device)
                cache.batch_select_indices(kept)
                mask_BT, tokens_B = mask_BT[kept], tokens_B[kept]
                going = [going[place] for place in left]
            ids_BT = tokens_B[:, None]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(going), 1)], 1)
            positions_BT = mask_BT.sum(1, keepdim=True) - 1
        return answers

    def _ends(self, token: int, stop: Sequence[str]) -> bool:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return token in self._eos or any(text in self._texts[token] for text in stop)


def _eos_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    named = ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in (*named, tokenizer.eos_token_id) if token is not None)


def _batches(ids: dict[str, list[int]]) -> Iterator[list[str]]:
    """Prompts of like length together."""
    batch: list[str] = []
    for prompt in sorted(ids, key=lambda prompt: len(ids[prompt])):
        if batch and (len(batch) + 1) * (len(ids[prompt]) + MAX_NEW_TOKENS) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask."""
    width = max(len(ids) for ids in prompts)
    ids_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=device)
    starts_B = torch.tensor([width - len(ids) for ids in prompts], device=device)
    mask_BT = (torch.arange(width, device=device) >= starts_B[:, None]).long()
    return ids_BT, mask_BT
