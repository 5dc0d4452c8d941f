"""LocFT-BF: fine-tune a few selected weights, breadth first over a whole batch of edits.

The method ("Fine-tuning Done Right in Model Editing", arXiv 2509.22072, section 4), all of it.
Every epoch goes over all edits in shuffled mini-batches. The loss is the cross-entropy of the
target's tokens and EOS, averaged over each sample's tokens, then over the samples. A batch that is
already learnt (loss below the threshold) takes no step, and a run whose epoch is, ends. Adam,
without weight decay, schedule or clipping; only the selected parameters have gradients.

Knows no process group: how a batch is spread over ranks and how a step is taken is the `Stepper`'s.
Shapes: B samples, T tokens, D hidden size, N tokens to learn, V vocabulary.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workers.contract import Hparams
from workers.errors import TrainingFailed, UnknownParameter
from workers.examples import IGNORED, Batch, Example, batches, collate


class Stepper(Protocol):
    """One optimizer step, cut in two so that the loop can decide between the halves."""

    def loss(self, batch: Sequence[Example]) -> float:
        """Mean loss over all of `batch`, the same on every rank; remembers how it was computed."""
        ...

    def step(self) -> None:
        """Back-propagates the loss last asked for and updates the selected parameters."""
        ...


@dataclass(frozen=True)
class Position:
    """Where the loop stands after a mini-batch."""

    epoch: int
    step: int
    """Optimizer steps taken so far."""
    samples: int
    """Seen in this epoch."""
    loss: float
    """Mean over them."""
    epoch_ended: bool


@dataclass(frozen=True)
class Outcome:
    """`epoch_losses` holds each epoch's mean loss over its samples, as met before their steps."""

    epoch_losses: tuple[float, ...]
    steps: int


def train(
    examples: Sequence[Example],
    hparams: Hparams,
    stepper: Stepper,
    watch: Callable[[Position], None],
) -> Outcome:
    """Runs the method to its end; `watch` is called after each mini-batch.

    Raises `TrainingFailed` naming the edits of a batch whose loss is not finite.
    """
    epoch_losses: list[float] = []
    steps = 0
    for epoch in range(1, hparams.max_epochs + 1):
        samples, total = 0, 0.0
        for batch in batches(examples, hparams.batch_size, hparams.seed, epoch):
            loss = stepper.loss(batch)
            _refuse_nonfinite(loss, batch, epoch, hparams)
            if loss >= hparams.loss_threshold:
                stepper.step()
                steps += 1
            samples += len(batch)
            total += loss * len(batch)
            ended = samples == len(examples)
            watch(Position(epoch, steps, samples, total / samples, ended))
        epoch_losses.append(total / samples)
        if epoch_losses[-1] < hparams.loss_threshold:
            break
    return Outcome(tuple(epoch_losses), steps)


def _refuse_nonfinite(loss: float, batch: Sequence[Example], epoch: int, hparams: Hparams) -> None:
    if not math.isfinite(loss):
        ids = ", ".join(example.edit_id for example in batch)
        raise TrainingFailed(
            f"loss is {loss} in epoch {epoch} for the batch of edits {ids}; "
            f"a learning rate below {hparams.learning_rate:g} may help"
        )


def select(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The parameters among `names` that `wanted` names, in the model's order.

    An entry names a parameter, or a module and so every parameter below it, by whole dotted
    components: `model.layers.2` never selects `model.layers.20`. Raises `UnknownParameter` for an
    entry that names none.
    """
    known = list(names)
    chosen: set[str] = set()
    for entry in wanted:
        found = [name for name in known if name == entry or name.startswith(f"{entry}.")]
        if not found:
            raise UnknownParameter(
                f"hparams.parameters: the model has no {entry!r}; "
                f"close to it: {_close(entry, known)}"
            )
        chosen.update(found)
    return [name for name in known if name in chosen]


def _close(entry: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(entry, known, n=3, cutoff=0.0)
    return ", ".join(found)


def freeze(model: nn.Module, wanted: Iterable[str]) -> dict[str, nn.Parameter]:
    """Takes the gradient from all parameters but the wanted ones (see `select`); returns these."""
    parameters = dict(model.named_parameters())
    tuned = select(parameters, wanted)
    model.requires_grad_(False)
    for name in tuned:
        parameters[name].requires_grad_()
    return {name: parameters[name] for name in tuned}


def adam(parameters: Iterable[nn.Parameter], hparams: Hparams) -> torch.optim.Adam:
    """The paper's optimizer: torch's defaults, no weight decay."""
    return torch.optim.Adam(parameters, lr=hparams.learning_rate, weight_decay=0.0)


class SampleLosses(nn.Module):
    """A causal language model as the function from a batch to each sample's loss.

    Logits are computed only at the positions whose next token is learnt.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()

    def forward(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over each sample's learnt tokens, in nats: float32 [B]."""
        hidden_BTD = self.decoder(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
        ).last_hidden_state
        next_BT = batch.labels_BT[:, 1:]
        learnt_BT = next_BT != IGNORED
        logits_NV = self.head(hidden_BTD[:, :-1][learnt_BT]).float()
        losses_N = nn.functional.cross_entropy(logits_NV, next_BT[learnt_BT], reduction="none")
        sums_B = losses_N.new_zeros(len(next_BT))
        sums_B = sums_B.index_add(0, learnt_BT.nonzero()[:, 0], losses_N)
        return sums_B / learnt_BT.sum(dim=1)


class LocalStepper:
    """The step in one process: plain torch.

    In bfloat16 the optimizer works on a float32 master of the selected parameters.
    """

    def __init__(self, model: Any, hparams: Hparams) -> None:
        self._tuned = list(freeze(model, hparams.parameters).values())
        self._masters = [nn.Parameter(weight.detach().float().clone()) for weight in self._tuned]
        self._optimizer = adam(self._masters, hparams)
        self._losses = SampleLosses(model)
        self._loss: Tensor | None = None

    def loss(self, batch: Sequence[Example]) -> float:
        self._loss = self._losses(collate(batch)).mean()
        return self._loss.item()

    def step(self) -> None:
        assert self._loss is not None, "step before loss"
        gradients = torch.autograd.grad(self._loss, self._tuned)
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient.float()
        self._optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self._tuned, self._masters, strict=True):
                weight.copy_(master)
        self._loss = None
