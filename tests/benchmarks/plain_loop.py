"""What the method's public code does, written plainly, for comparison.

Float32, every layer in every step, batches padded on the left, logits at all positions, Adam.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from workers.contract import Hparams
from workers.examples import Example, batches
from workers.locft import freeze

IGNORED = -100


@dataclass
class Run:
    """How a run went: batch losses in order, each epoch's mean loss and seconds."""

    losses: list[float] = field(default_factory=list)
    epoch_losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    prefix_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.prefix_s + sum(self.seconds)


def train(model: Any, examples: Sequence[Example], hparams: Hparams) -> Run:
    tuned = list(freeze(model, hparams.parameters).values())
    optimizer = torch.optim.Adam(tuned, lr=hparams.learning_rate)
    run = Run()
    for epoch in range(1, hparams.max_epochs + 1):
        began, total = time.perf_counter(), 0.0
        for batch in batches(examples, hparams.batch_size, hparams.seed, epoch):
            loss = batch_loss(model, batch)
            run.losses.append(loss.item())
            total += loss.item() * len(batch)
            if loss.item() >= hparams.loss_threshold:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        run.seconds.append(time.perf_counter() - began)
        run.epoch_losses.append(total / len(examples))
        if run.epoch_losses[-1] < hparams.loss_threshold:
            break
    return run


def batch_loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    length = max(len(example.prompt) + len(example.target) for example in batch)
    ids_BT = torch.zeros(len(batch), length, dtype=torch.long)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, IGNORED)
    for row, example in enumerate(batch):
        tokens = torch.tensor(example.prompt + example.target)
        ids_BT[row, -len(tokens) :] = tokens
        mask_BT[row, -len(tokens) :] = 1
        labels_BT[row, -len(example.target) :] = torch.tensor(example.target)
    ids_BT, mask_BT, labels_BT = (ids.to(model.device) for ids in (ids_BT, mask_BT, labels_BT))
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits.float()
    next_BT = labels_BT[:, 1:]
    losses_BT = nn.functional.cross_entropy(
        logits_BTV[:, :-1].transpose(1, 2), next_BT, ignore_index=IGNORED, reduction="none"
    )
    counts_B = (next_BT != IGNORED).sum(dim=1)
    return (losses_BT.sum(dim=1) / counts_B).mean()
