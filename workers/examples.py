"""Edits as tokens: which are read, which are learnt, and in which batches.

Knows the tokenizer, not the model; nothing here depends on how many processes train.
Shapes: B samples, T tokens.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workers.contract import EditRecord
from workers.errors import TrainingFailed

IGNORED = -100


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    eos_token_id: int | None

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Example:
    """One edit as token ids: a prompt, and the target with EOS at its end."""

    edit_id: str
    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right; label t is the token at t, or `IGNORED` where none is learnt."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    labels_BT: Tensor


def tokenize(edits: Sequence[EditRecord], tokenizer: Tokenizer, context: int) -> list[Example]:
    """One example per edit, at most `context` tokens long.

    The prompt is as is, begun as the tokenizer begins any text (with BOS, if it has one), and its
    tokens are exactly those of a query with it; the target has a space before it and EOS after it.
    Raises `TrainingFailed` naming the edit.
    """
    if tokenizer.eos_token_id is None:
        raise TrainingFailed(
            "the tokenizer has no EOS token, which each target must end with; "
            "state `eos_token` in tokenizer_config.json"
        )
    return [_example(edit, tokenizer, tokenizer.eos_token_id, context) for edit in edits]


def _example(edit: EditRecord, tokenizer: Tokenizer, eos: int, context: int) -> Example:
    prompt = _without_final_eos(tokenizer.encode(edit.prompt), eos)
    target = edit.target if edit.target[:1].isspace() else f" {edit.target}"
    learnt = _continuation(edit.prompt, prompt, target, tokenizer, eos)
    if not edit.target.strip() or not learnt:
        raise TrainingFailed(f"edit {edit.id}: the target {edit.target!r} has no tokens to learn")
    if not prompt:
        raise TrainingFailed(f"edit {edit.id}: the prompt {edit.prompt!r} has no tokens")
    example = Example(edit.id, tuple(prompt), (*learnt, eos))
    if len(example) > context:
        raise TrainingFailed(
            f"edit {edit.id}: prompt and target have {len(example)} tokens, "
            f"more than the model's context of {context}; shorten the prompt"
        )
    return example


def _continuation(
    text: str, prompt: list[int], target: str, tokenizer: Tokenizer, eos: int
) -> list[int]:
    """The target's tokens as they follow the prompt's.

    Cut out of the whole text, because a tokenizer may begin every text with a space of its own;
    tokenized alone where the whole would merge tokens over the boundary.
    """
    whole = _without_final_eos(tokenizer.encode(text + target), eos)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return tokenizer.encode(target, add_special_tokens=False)


def _without_final_eos(ids: list[int], eos: int) -> list[int]:
    """Some tokenizers end every text with EOS; the answer has yet to come."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids


def batches(
    examples: Sequence[Example], batch_size: int, seed: int, epoch: int
) -> Iterator[list[Example]]:
    """An epoch's shuffled mini-batches, a function of the arguments alone; last may be short."""
    order = list(range(len(examples)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    for start in range(0, len(order), batch_size):
        yield [examples[index] for index in order[start : start + batch_size]]


def collate(examples: Sequence[Example]) -> Batch:
    """Pads on the right to the longest of `examples`; padding has id 0 and attention 0."""
    length = max(len(example) for example in examples)
    ids_BT = torch.zeros(len(examples), length, dtype=torch.long)
    mask_BT = torch.zeros(len(examples), length, dtype=torch.long)
    labels_BT = torch.full((len(examples), length), IGNORED)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example)
        ids_BT[row, :end] = torch.tensor(example.prompt + example.target)
        mask_BT[row, :end] = 1
        labels_BT[row, start:end] = torch.tensor(example.target)
    return Batch(ids_BT, mask_BT, labels_BT)
