"""One version's likelihood of given tokens: a prompt in, log-probabilities out.

Owns the forward pass and its memory. Knows nothing of text, of generation, nor of other versions.
Shapes: T tokens of the prompt, t tokens of a block, V vocabulary, D hidden size, K top tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

BLOCK_TOKENS = 256
"""Logits are made for so many positions at a time."""


@dataclass(frozen=True)
class Scores:
    """Natural logarithms of probabilities; entry t is for the token at t, given those before it."""

    logprobs: list[float | None]
    """Of the prompt's T tokens; None for the first one, which nothing comes before."""
    likeliest: list[list[tuple[int, float]]]
    """T + 1 lists of K token ids, likeliest first; empty for the first, the last follows all."""


@torch.no_grad()
def score(model: Any, prompt: Sequence[int], top: int) -> Scores:
    """One forward pass of a causal language model that does nothing else meanwhile; K is `top`."""
    tokens_T = torch.tensor(prompt, device=model.device)
    hidden_TD = model.get_decoder()(tokens_T[None], use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    scores = Scores([None], [[]])
    for start in range(0, len(prompt), BLOCK_TOKENS):
        logprobs_tV = head(hidden_TD[start : start + BLOCK_TOKENS]).float().log_softmax(-1)
        next_t = tokens_T[start + 1 : start + 1 + BLOCK_TOKENS]
        own_t = logprobs_tV[: len(next_t)].gather(-1, next_t[:, None])[:, 0]
        scores.logprobs.extend(own_t.tolist())
        best_tK, index_tK = logprobs_tV.topk(top)
        for indices, best in zip(index_tK.tolist(), best_tK.tolist(), strict=True):
            scores.likeliest.append(list(zip(indices, best, strict=True)))
    return scores
