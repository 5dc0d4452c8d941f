"""Edits as tokens: which are read, which are learnt, in which batches, and how a batch is laid out.

Knows the tokenizer, not the model; nothing here depends on how many processes train.
Shapes: B samples, T tokens read, N tokens to learn, R rows of C cells.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch
from torch import Tensor

from workers.contract import Anchor, EditRecord, Format
from workers.errors import TrainingFailed
from workers.formats import ChatTokenizer, render

ROW_CELLS = 64
"""A row is no longer than this, or than its batch's longest sample."""


class Tokenizer(ChatTokenizer, Protocol):
    """The part of a transformers tokenizer that is used."""

    eos_token_id: int | None

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Example:
    """One sample as token ids: a prompt, and the target with EOS at its end.

    The last token of the target is learnt and never read.
    """

    index: int
    """Its place among the job's samples."""
    edit_id: str
    """`anchor` for what is not an edit."""
    prompt: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        return self.prompt + self.target[:-1]

    def __len__(self) -> int:
        """How many tokens are read."""
        return len(self.prompt) + len(self.target) - 1


def tokenize(
    edits: Sequence[EditRecord],
    tokenizer: Tokenizer,
    context: int,
    formats: Sequence[Format] = ("raw",),
    anchors: Sequence[Anchor] = (),
) -> list[Example]:
    """One example per edit and format, and one per anchor, at most `context` tokens long.

    A prompt begins as the tokenizer begins any text (with BOS, if it has one), and its tokens are
    exactly those of a query with it; the target has a space before it, unless the format's text
    ends a line, and EOS after it. Raises `TrainingFailed` naming the edit.
    """
    if tokenizer.eos_token_id is None:
        raise TrainingFailed(
            "the tokenizer has no EOS token, which each target must end with; "
            "state `eos_token` in tokenizer_config.json"
        )
    _refuse_conflicts(edits)
    texts = [
        (edit.id, render(edit.prompt, format, tokenizer, trained=True), edit.target)
        for edit in edits
        for format in formats
    ]
    texts += [("anchor", anchor.prompt, anchor.answer) for anchor in anchors]
    return [
        _example(index, *text, tokenizer, tokenizer.eos_token_id, context)
        for index, text in enumerate(texts)
    ]


def _refuse_conflicts(edits: Sequence[EditRecord]) -> None:
    first: dict[str, EditRecord] = {}
    for edit in edits:
        other = first.setdefault(" ".join(edit.prompt.split()).casefold(), edit)
        if other.target.strip() != edit.target.strip():
            raise TrainingFailed(
                f"edits {other.id} and {edit.id} have the same prompt {edit.prompt!r} and the "
                f"targets {other.target!r} and {edit.target!r}; keep one of them"
            )


def _example(
    index: int, edit_id: str, text: str, target: str, tokenizer: Tokenizer, eos: int, context: int
) -> Example:
    prompt = _without_final_eos(tokenizer.encode(text), eos)
    joined = target if target[:1].isspace() or text.endswith("\n") else f" {target}"
    learnt = _continuation(text, prompt, joined, tokenizer, eos)
    if not target.strip() or not learnt:
        raise TrainingFailed(f"edit {edit_id}: the target {target!r} has no tokens to learn")
    if not prompt:
        raise TrainingFailed(f"edit {edit_id}: the prompt {text!r} has no tokens")
    example = Example(index, edit_id, tuple(prompt), (*learnt, eos))
    if len(example) > context:
        raise TrainingFailed(
            f"edit {edit_id}: prompt and target have {len(example)} tokens, "
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


@dataclass(frozen=True)
class Batch:
    """B samples laid out in rows, several one after the other in a row; no row has a mask.

    Positions start again at 0 with each sample, which is how transformers tells them apart; each
    cell that is left over is a sample of its own.
    """

    tokens_T: Tensor
    """The samples' tokens, one sample after the other in the order given."""
    cell_T: Tensor
    """The cell each is in, of R * C."""
    position_ids_RC: Tensor
    learnt_from_N: Tensor
    """The cell before each token to learn."""
    next_N: Tensor
    """That token."""
    sample_N: Tensor
    """The sample it belongs to, in 0..B."""
    counts_B: Tensor
    """How many tokens each sample has to learn."""

    def to(self, device: torch.device) -> Self:
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


def pack(examples: Sequence[Example]) -> Batch:
    """Lays `examples` out in as few rows as first-fit finds, longest first."""
    starts, rows, columns = _places([len(example) for example in examples])
    positions_RC = torch.zeros(rows * columns, dtype=torch.long)
    cells, learnt_from = [], []
    for example, start in zip(examples, starts, strict=True):
        cells.append(torch.arange(start, start + len(example)))
        positions_RC[start : start + len(example)] = torch.arange(len(example))
        learnt_from.append(cells[-1][len(example.prompt) - 1 :])
    counts_B = torch.tensor([len(example.target) for example in examples])
    return Batch(
        tokens_T=torch.tensor([token for example in examples for token in example.read]),
        cell_T=torch.cat(cells),
        position_ids_RC=positions_RC.view(rows, columns),
        learnt_from_N=torch.cat(learnt_from),
        next_N=torch.tensor([token for example in examples for token in example.target]),
        sample_N=torch.arange(len(examples)).repeat_interleave(counts_B),
        counts_B=counts_B,
    )


def _places(lengths: Sequence[int]) -> tuple[list[int], int, int]:
    """Each sample's first cell, and how many rows and columns there are.

    Rows are as short as they can be without there being more of them.
    """
    most = max(ROW_CELLS, *lengths)
    fewest = len(_rows(lengths, most))
    even = max(*lengths, -(-sum(lengths) // fewest), 1)
    columns = next(c for c in range(even, most + 1) if len(_rows(lengths, c)) <= fewest)
    starts = [0] * len(lengths)
    for row, samples in enumerate(_rows(lengths, columns)):
        start = row * columns
        for sample in samples:
            starts[sample] = start
            start += lengths[sample]
    return starts, fewest, columns


def _rows(lengths: Sequence[int], columns: int) -> list[list[int]]:
    """The samples in each row: first-fit, the longest first."""
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        row = next((row for row, left in enumerate(room) if left >= lengths[sample]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(columns)
        rows[row].append(sample)
        room[row] -= lengths[sample]
    return rows
