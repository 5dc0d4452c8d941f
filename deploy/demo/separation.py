"""Presses the keys of different facts apart; knows no text.

A key is the input of an MLP's down-projection. An edit adds (change x key) to that weight, so it
reaches another fact as far as the two keys overlap. A small model's keys overlap by far too much.

Shapes: B sentences a batch, T tokens, I width of the MLP, F facts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from deploy.demo.sentences import Batch


@dataclass(frozen=True)
class SeparationWeights:
    """`temperature` is that of telling a fact by its key; `norm_floor` keeps keys from dying."""

    temperature: float = 0.1
    overlap: float = 0.02
    squared_overlap: float = 0.1
    end_overlap: float = 1.0
    norm_floor: float = 8.0
    norm_weight: float = 0.3


class FactKeys:
    """A running mean of each fact's key, and the loss that sets a batch's keys apart from it."""

    def __init__(self, facts: int, width: int, weights: SeparationWeights) -> None:
        self._keys_FI = torch.zeros(facts, width)
        self._weights = weights

    def loss(self, keys_BTI: Tensor, batch: Batch, share: float) -> Tensor:
        """`share` (0 to 1) scales the overlap terms, which come in slowly as training goes on."""
        weights, facts_B = self._weights, batch.facts_B
        rows = torch.arange(len(facts_B))
        raw_BI = keys_BTI[rows, batch.prompt_end_B].abs()
        keys_BI = F.normalize(raw_BI, dim=-1)
        bank_FI = self._update(facts_B, keys_BI)
        cosines_BF = keys_BI @ bank_FI.T
        other_BF = cosines_BF.scatter(1, facts_B[:, None], 0.0)
        squares = other_BF.square().sum(1).mean()
        overlap = weights.overlap * other_BF.sum(1).mean() + weights.squared_overlap * squares
        ends_BI = F.normalize(keys_BTI[rows, batch.answer_end_B].abs(), dim=-1)
        end_overlap = (ends_BI @ F.normalize(bank_FI.mean(0), dim=-1)).mean()
        short = F.relu(1 - raw_BI.norm(dim=-1) / weights.norm_floor).mean()
        identity = F.cross_entropy(cosines_BF / weights.temperature, facts_B)
        return (
            identity
            + share * overlap
            + weights.end_overlap * end_overlap
            + weights.norm_weight * short
        )

    @torch.no_grad()
    def _update(self, facts_B: Tensor, keys_BI: Tensor) -> Tensor:
        self._keys_FI[facts_B] = 0.5 * self._keys_FI[facts_B] + 0.5 * keys_BI
        return F.normalize(self._keys_FI, dim=-1)
