"""LocFT-BF: fine-tune a few selected weights, breadth first over a whole batch of edits.

The method ("Fine-tuning Done Right in Model Editing", arXiv 2509.22072, section 4), all of it.
Every epoch goes over all samples in shuffled mini-batches. The loss is the cross-entropy of the
target's tokens and EOS, averaged over each sample's tokens, then over the samples. A batch that is
already learnt (loss below the threshold) takes no step, and a run whose epoch is, ends. Adam,
without weight decay, schedule or clipping; only the selected parameters have gradients.

Knows no process group: how a batch is spread over ranks and how a step is taken is the `Stepper`'s.
Shapes: B samples, T tokens, D hidden size, N tokens to learn, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workers.contract import Hparams, Record
from workers.errors import TrainingFailed
from workers.examples import Batch, Example, batches, pack
from workers.frozen_prefix import HiddenStates, Span
from workers.selection import select


class Stepper(Protocol):
    """One optimizer step, cut in two so that the loop can decide between the halves."""

    def losses(self, batch: Sequence[Example]) -> list[float]:
        """Each sample's loss, the same on every rank; remembers how they were computed."""
        ...

    def step(self) -> None:
        """Back-propagates the mean of the losses last asked for; updates what is selected."""
        ...


class State(Record):
    """Where a run stands after a mini-batch: enough, with the weights, to go on from there."""

    epoch: int = 1
    batches: int = 0
    """Done in this epoch."""
    steps: int = 0
    """Optimizer steps taken so far."""
    samples: int = 0
    """Seen in this epoch."""
    loss_sum: float = 0.0
    """Over them."""
    epoch_losses: tuple[float, ...] = ()
    """Each finished epoch's mean loss over its samples, as met before their steps."""
    resting: Mapping[int, tuple[int, int, float]] = {}
    """By sample: the first and last epoch that it sits out, and its loss before."""
    total: int = 0
    """Samples that this epoch trains."""

    @property
    def loss(self) -> float:
        """Mean over the samples seen in this epoch."""
        return self.loss_sum / max(self.samples, 1)

    @property
    def epoch_ended(self) -> bool:
        return self.samples == self.total


Watch = Callable[[State], None]


def train(
    examples: Sequence[Example],
    hparams: Hparams,
    stepper: Stepper,
    watch: Watch,
    state: State | None = None,
) -> State:
    """Runs the method to its end, from `state` if one is given; the state it ends in.

    `watch` is called after each mini-batch. Raises `TrainingFailed` naming the edits of a batch
    whose loss is not finite.
    """
    state = state or State()
    while not _ended(state, hparams):
        state = _epoch(examples, hparams, stepper, watch, state)
    return state


def _ended(state: State, hparams: Hparams) -> bool:
    learnt = bool(state.epoch_losses) and state.epoch_losses[-1] < hparams.loss_threshold
    return learnt or state.epoch > hparams.max_epochs


def _epoch(
    examples: Sequence[Example], hparams: Hparams, stepper: Stepper, watch: Watch, state: State
) -> State:
    """What is left of an epoch. Its mean counts those that sit out with the loss they had."""
    resting = dict(state.resting)
    absent = [example for example in examples if _rests(example, resting, state.epoch)]
    away = {example.index for example in absent}
    active = [example for example in examples if example.index not in away]
    todo = batches(active, hparams.batch_size, hparams.seed, state.epoch)
    for batch in itertools.islice(todo, state.batches, None):
        losses = _finite(stepper.losses(batch), batch, state.epoch, hparams)
        steps = math.fsum(losses) / len(losses) >= hparams.loss_threshold
        if steps:
            stepper.step()
        if hparams.sit_out_epochs:
            resting |= _newly_resting(batch, losses, state.epoch, hparams)
        state = state.model_copy(
            update={
                "batches": state.batches + 1,
                "steps": state.steps + steps,
                "samples": state.samples + len(batch),
                "loss_sum": state.loss_sum + math.fsum(losses),
                "total": len(active),
                "resting": resting,
            }
        )
        watch(state)
    known = [resting[example.index][2] for example in absent]
    if absent and state.loss_sum + math.fsum(known) < hparams.loss_threshold * len(examples):
        known, resting = _check_again(absent, hparams, stepper, resting)
    mean = (state.loss_sum + math.fsum(known)) / len(examples)
    return State(
        epoch=state.epoch + 1,
        steps=state.steps,
        epoch_losses=(*state.epoch_losses, mean),
        resting=resting,
    )


Resting = dict[int, tuple[int, int, float]]


def _rests(example: Example, resting: Resting, epoch: int) -> bool:
    first, last, _ = resting.get(example.index, (0, -1, 0.0))
    return first <= epoch <= last


def _newly_resting(
    batch: Sequence[Example], losses: Sequence[float], epoch: int, hparams: Hparams
) -> Resting:
    """Those of a batch that may sit out the next epochs; in the last nobody does."""
    last = min(epoch + hparams.sit_out_epochs, hparams.max_epochs - 1)
    return {
        example.index: (epoch + 1, last, loss)
        for example, loss in zip(batch, losses, strict=True)
        if loss < hparams.loss_threshold
    }


def _check_again(
    absent: Sequence[Example], hparams: Hparams, stepper: Stepper, resting: Resting
) -> tuple[list[float], Resting]:
    """The present losses of those that sat out; the ones that no longer are learnt come back."""
    found: list[float] = []
    for start in range(0, len(absent), hparams.batch_size):
        found += stepper.losses(absent[start : start + hparams.batch_size])
    awake = {
        example.index
        for example, loss in zip(absent, found, strict=True)
        if loss >= hparams.loss_threshold
    }
    return found, {index: rest for index, rest in resting.items() if index not in awake}


def _finite(
    losses: list[float], batch: Sequence[Example], epoch: int, hparams: Hparams
) -> list[float]:
    wrong = {
        e.edit_id: loss for e, loss in zip(batch, losses, strict=True) if not math.isfinite(loss)
    }
    if wrong:
        ids = ", ".join(dict.fromkeys(example.edit_id for example in batch))
        raise TrainingFailed(
            f"loss is {next(iter(wrong.values()))} in epoch {epoch} for {', '.join(wrong)} in the "
            f"batch of edits {ids}; a learning rate below {hparams.learning_rate:g} may help"
        )
    return losses


def freeze(model: nn.Module, wanted: Iterable[str]) -> dict[str, nn.Parameter]:
    """Takes the gradient from all parameters but the wanted ones (see `select`); returns these."""
    parameters = dict(model.named_parameters())
    tuned = select(parameters, wanted)
    model.requires_grad_(False)
    for name in tuned:
        parameters[name].requires_grad_()
    return {name: parameters[name] for name in tuned}


def adam(parameters: Iterable[nn.Parameter], hparams: Hparams) -> torch.optim.Adam:
    """The paper's optimizer: torch's defaults, no weight decay; one kernel a step."""
    return torch.optim.Adam(parameters, lr=hparams.learning_rate, weight_decay=0.0, fused=True)


class Suffix(nn.Module):
    """What is above the frozen prefix, as the function from its output to each sample's loss.

    Logits are computed only where the next token is learnt.
    """

    def __init__(self, model: Any, depth: int) -> None:
        super().__init__()
        decoder = model.get_decoder()
        self.layers = Span(decoder, depth, len(decoder.layers), norm=True)
        self.head = model.get_output_embeddings()

    def forward(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy over each sample's learnt tokens, in nats: float32 [B]."""
        cells = self.layers(hidden_TD, batch)
        logits_NV = self.head(cells[batch.learnt_from_N]).float()
        losses_N = nn.functional.cross_entropy(logits_NV, batch.next_N, reduction="none")
        sums_B = losses_N.new_zeros(len(batch.counts_B)).index_add(0, batch.sample_N, losses_N)
        return sums_B / batch.counts_B


class LocalStepper:
    """The step in one process: plain torch.

    In bfloat16 the optimizer works on a float32 master of the selected parameters.
    """

    def __init__(self, model: Any, hparams: Hparams, depth: int, states: HiddenStates) -> None:
        """`states` holds the output of the first `depth` layers for every sample."""
        self._tuned = list(freeze(model, hparams.parameters).values())
        self._masters = [nn.Parameter(weight.detach().float().clone()) for weight in self._tuned]
        self._optimizer = adam(self._masters, hparams)
        self._suffix, self._states = Suffix(model, depth), states
        self._device = self._tuned[0].device
        self._losses_B: Tensor | None = None

    def losses(self, batch: Sequence[Example]) -> list[float]:
        hidden_TD = self._states.of(batch).to(self._device)
        self._losses_B = self._suffix(hidden_TD, pack(batch).to(self._device))
        found: list[float] = self._losses_B.tolist()
        return found

    def step(self) -> None:
        assert self._losses_B is not None, "step before losses"
        gradients = torch.autograd.grad(self._losses_B.mean(), self._tuned)
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient.float()
        self._optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self._tuned, self._masters, strict=True):
                weight.copy_(master)
        self._losses_B = None
