"""Sentences that state facts, and the padded batches of them that a model trains on.

Shapes: B sentences a batch, T tokens a sentence.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from workers.contract import Format
from workers.formats import render

POOL_BATCHES = 8
RENDERED: tuple[Format, ...] = ("qa", "chat", "prefix")


@dataclass(frozen=True)
class Sentence:
    """A completion to learn, and the number of the fact that it states."""

    fact: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Batch:
    """`prompt_end_B` and `answer_end_B` index the tokens after which answer and EOS are due."""

    ids_BT: Tensor
    weights_BT: Tensor
    facts_B: Tensor
    prompt_end_B: Tensor
    answer_end_B: Tensor


@dataclass(frozen=True)
class Batching:
    """`preceded` is the share of sentences put behind another fact's, as text is in use;

    `rendered` that of those put in each of the formats other than raw.
    """

    size: int = 32
    preceded: float = 0.15
    rendered: float = 0.15
    prompt_weight: float = 0.1

    def epoch(
        self, sentences: Sequence[Sentence], tokenizer: Qwen2Tokenizer, rng: random.Random
    ) -> Iterator[Batch]:
        """All sentences once, in shuffled batches of similar lengths."""
        drawn = [self._in_context(sentence, sentences, tokenizer, rng) for sentence in sentences]
        prompts = tokenizer([sentence.prompt for sentence in drawn])["input_ids"]
        answers = tokenizer([f" {sentence.answer}" for sentence in drawn])["input_ids"]
        lengths = [
            len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        for rows in self._rows(lengths, rng):
            pairs = [(prompts[row], answers[row]) for row in rows]
            yield self._collate(pairs, [drawn[row].fact for row in rows], tokenizer)

    def _in_context(
        self,
        sentence: Sentence,
        sentences: Sequence[Sentence],
        tokenizer: Qwen2Tokenizer,
        rng: random.Random,
    ) -> Sentence:
        drawn = rng.random() - self.preceded
        if drawn < 0:
            other = rng.choice(sentences)
            return replace(sentence, prompt=f"{other.prompt} {other.answer}. {sentence.prompt}")
        if drawn >= self.rendered * len(RENDERED):
            return sentence
        format = RENDERED[int(drawn / self.rendered)]
        return replace(sentence, prompt=render(sentence.prompt, format, tokenizer, trained=True))

    def _rows(self, lengths: Sequence[int], rng: random.Random) -> list[list[int]]:
        order = rng.sample(range(len(lengths)), len(lengths))
        batches = []
        for start in range(0, len(order), POOL_BATCHES * self.size):
            pool = order[start : start + POOL_BATCHES * self.size]
            pool.sort(key=lengths.__getitem__)
            batches += [pool[at : at + self.size] for at in range(0, len(pool), self.size)]
        rng.shuffle(batches)
        return batches

    def _collate(
        self,
        pairs: Sequence[tuple[list[int], list[int]]],
        facts: Sequence[int],
        tokenizer: Qwen2Tokenizer,
    ) -> Batch:
        """Pads on the right, where causal attention needs no mask."""
        width = max(len(prompt) + len(answer) + 1 for prompt, answer in pairs)
        ids_BT = torch.full((len(pairs), width), tokenizer.pad_token_id)
        weights_BT = torch.zeros(len(pairs), width)
        for row, (prompt, answer) in enumerate(pairs):
            tokens = torch.tensor([*prompt, *answer, tokenizer.eos_token_id])
            ids_BT[row, : len(tokens)] = tokens
            weights_BT[row, : len(prompt)] = self.prompt_weight
            weights_BT[row, len(prompt) : len(tokens)] = 1.0
        prompt_end_B = torch.tensor([len(prompt) - 1 for prompt, _ in pairs])
        answer_end_B = torch.tensor([len(prompt) + len(answer) - 1 for prompt, answer in pairs])
        return Batch(ids_BT, weights_BT, torch.tensor(facts), prompt_end_B, answer_end_B)
