"""The method in one process: what is tuned, what is learnt, when it stops."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.architectures import tiny
from workers import examples, frozen_prefix, locft, models, zero3
from workers.contract import EditRecord, Hparams
from workers.errors import BadHparams, TrainingFailed, UnknownParameter
from workers.examples import Example
from workers.frozen_prefix import HiddenStates
from workers.locft import LocalStepper, State, Suffix
from workers.progress import ignore
from workers.selection import select

TUNED = "model.layers.1.mlp.down_proj.weight"

MakeModel = Callable[..., Any]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def samples(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    edits = [
        EditRecord(
            id=f"ed_{number}",
            prompt=f"{number} " + "fact " * (1 + number % 3),
            target=f"is {number}",
        )
        for number in range(11)
    ]
    return examples.tokenize(edits, tokenizer, context=128)


def hparams(**changes: Any) -> Hparams:
    values = {"parameters": (TUNED,), "learning_rate": 1e-2, "batch_size": 4, "max_epochs": 3}
    return Hparams.model_validate({**values, **changes})


def prefix_of(model: Any, depth: int, samples: Sequence[Example]) -> HiddenStates:
    """The frozen prefix's output, in memory."""
    width = model.config.hidden_size
    states = HiddenStates(samples, width, model.dtype, 1 << 30, Path("unused"))
    frozen_prefix.run(model.get_decoder(), depth, samples, states)
    return states


def stepper_for(model: Any, chosen: Hparams, samples: Sequence[Example]) -> LocalStepper:
    return LocalStepper(model, chosen, 1, prefix_of(model, 1, samples))


def read_nothing(name: str, start: int, end: int) -> torch.Tensor:
    raise AssertionError(f"{name} [{start}, {end})")


def test_a_parents_tensor_must_be_tuned_again(make_model: MakeModel) -> None:
    """Or the new version would silently have the base model's value of it."""
    tuned = locft.freeze(make_model(), [TUNED])
    other = "model.layers.2.mlp.down_proj.weight"
    with pytest.raises(BadHparams, match=rf"{other}, which this job does not tune"):
        zero3.overwrite(tuned, [other], read_nothing)


NAMES = [f"model.layers.{layer}.mlp.down_proj.{kind}" for layer in (2, 20) for kind in "wb"]


def test_a_layer_never_selects_another_that_begins_alike() -> None:
    assert select(NAMES, ["model.layers.2"]) == NAMES[:2]


def test_names_are_exact_and_in_the_models_order() -> None:
    wanted = [NAMES[2], "model.layers.2.mlp"]
    assert select(NAMES, wanted) == NAMES[:3]


@pytest.mark.parametrize("wanted", ["layers.2", "model.layers.2.mlp.down", "model.layers.2.", ""])
def test_an_unknown_name_is_refused_with_close_ones(wanted: str) -> None:
    with pytest.raises(UnknownParameter, match=r"the model has no .*close to it: model\.layers"):
        select(NAMES, [wanted])


def test_what_the_model_has_instead_is_listed() -> None:
    with pytest.raises(UnknownParameter, match=r"model\.layers has 2, 20$"):
        select(NAMES, ["model.layers.7.mlp"])
    with pytest.raises(UnknownParameter, match=r"model\.layers\.2\.mlp has down_proj$"):
        select(NAMES, ["model.layers.2.mlp.up_proj.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_selected_tensor_changes(
    make_model: MakeModel, samples: list[Example], dtype: str
) -> None:
    model = make_model(getattr(torch, dtype))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = hparams(dtype=dtype)
    outcome = locft.train(samples, chosen, stepper_for(model, chosen, samples), ignore)
    after = model.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [TUNED]
    assert after[TUNED].dtype == getattr(torch, dtype)
    assert outcome.epoch_losses[-1] < outcome.epoch_losses[0]
    assert outcome.steps == 9


def test_small_updates_add_up_in_bfloat16(make_model: MakeModel, samples: list[Example]) -> None:
    """Each is lost to rounding by itself: weights of 0.02 have steps of 1e-4 in bfloat16."""
    model = make_model(torch.bfloat16)
    before = model.state_dict()[TUNED].clone()
    chosen = hparams(dtype="bfloat16", learning_rate=1e-6, max_epochs=20)
    locft.train(samples, chosen, stepper_for(model, chosen, samples), ignore)
    assert (model.state_dict()[TUNED] != before).float().mean() > 0.2


def plain_loop(model: Any, samples: list[Example], chosen: Hparams) -> list[float]:
    """The method once more, with whole logits and one sample at a time."""
    weight = model.get_parameter(TUNED)
    optimizer = torch.optim.Adam([weight], lr=chosen.learning_rate)
    epoch_losses = []
    for epoch in range(1, chosen.max_epochs + 1):
        total = 0.0
        for batch in examples.batches(samples, chosen.batch_size, chosen.seed, epoch):
            loss = torch.stack([sample_loss(model, example) for example in batch]).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item() * len(batch)
        epoch_losses.append(total / len(samples))
    return epoch_losses


def sample_loss(model: Any, example: Example) -> torch.Tensor:
    ids = torch.tensor([example.prompt + example.target])
    logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
    return nn.functional.cross_entropy(logits.float(), torch.tensor(example.target))


def test_equals_a_plain_loop(make_model: MakeModel, samples: list[Example]) -> None:
    ours, plain = make_model(), make_model()
    chosen = hparams(max_epochs=7)
    outcome = locft.train(samples, chosen, stepper_for(ours, chosen, samples), ignore)
    assert outcome.epoch_losses == pytest.approx(plain_loop(plain, samples, chosen), abs=1e-5)
    assert outcome.steps == 21
    torch.testing.assert_close(
        ours.get_parameter(TUNED), plain.get_parameter(TUNED), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("architecture", models.SUPPORTED)
def test_the_suffix_equals_the_whole_model(
    architecture: str, depth: int, samples: list[Example]
) -> None:
    """Losses and gradients, of samples that share rows, behind a prefix that ran once."""
    model = tiny(architecture)
    tuned = list(locft.freeze(model, [f"model.layers.{depth}"]).values())
    states = prefix_of(model, depth, samples)
    losses_B = Suffix(model, depth)(states.of(samples), examples.pack(samples))
    expected_B = torch.stack([sample_loss(model, example) for example in samples])
    torch.testing.assert_close(losses_B, expected_B, atol=1e-5, rtol=0)
    found = torch.autograd.grad(losses_B.mean(), tuned, allow_unused=True)
    expected = torch.autograd.grad(expected_B.mean(), tuned, allow_unused=True)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)


class ScriptedStepper:
    """Says the losses it is given, and counts the steps."""

    def __init__(self, losses: Sequence[float]) -> None:
        self._losses = iter(losses)
        self.stepped: list[float] = []
        self._last = math.nan

    def losses(self, batch: Sequence[Example]) -> list[float]:
        self._last = next(self._losses)
        return [self._last] * len(batch)

    def step(self) -> None:
        self.stepped.append(self._last)


def test_a_learnt_batch_takes_no_step_and_a_learnt_epoch_is_the_last(
    samples: list[Example],
) -> None:
    stepper = ScriptedStepper([1.0, 0.001, 0.5, 0.01, 0.009, 0.002])
    ended = locft.train(samples, hparams(max_epochs=9), stepper, ignore)
    assert stepper.stepped == [1.0, 0.5, 0.01]
    assert ended.steps == 3
    assert ended.epoch_losses == pytest.approx([5.504 / 11, 0.082 / 11])


def test_states_tell_where_the_loop_stands(samples: list[Example]) -> None:
    seen: list[State] = []
    locft.train(samples, hparams(max_epochs=1), ScriptedStepper([3.0, 0.0, 1.0]), seen.append)
    assert [(at.epoch, at.steps, at.samples, at.epoch_ended) for at in seen] == [
        (1, 1, 4, False),
        (1, 1, 8, False),
        (1, 2, 11, True),
    ]
    assert [at.loss for at in seen] == pytest.approx([3.0, 1.5, 15 / 11])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_the_batch(samples: list[Example], loss: float) -> None:
    stepper = ScriptedStepper([1.0, loss])
    [_, batch, _] = examples.batches(samples, 4, seed=0, epoch=1)
    names = ", ".join(example.edit_id for example in batch)
    with pytest.raises(
        TrainingFailed, match=f"loss is {loss} in epoch 1 .*batch of edits {names};"
    ):
        locft.train(samples, hparams(), stepper, ignore)
    assert stepper.stepped == [1.0]


class LearntStepper:
    """Losses by sample and epoch; a check without a step counts as one more epoch."""

    def __init__(self, losses: Callable[[int, int], float]) -> None:
        self._losses = losses
        self.asked: list[list[int]] = [[]]

    def losses(self, batch: Sequence[Example]) -> list[float]:
        if set(self.asked[-1]) & {example.index for example in batch}:
            self.asked.append([])
        self.asked[-1] += [example.index for example in batch]
        return [self._losses(len(self.asked), example.index) for example in batch]

    def step(self) -> None: ...


def test_learnt_samples_sit_out_and_are_checked_again_before_the_end(
    samples: list[Example],
) -> None:
    """Sample 0 is learnt at once and forgotten later: the check finds it, and it is trained."""

    def loss(epoch: int, sample: int) -> float:
        if sample == 0:
            return {1: 0.0, 2: 0.6}.get(epoch, 0.0)
        return 1.0 if epoch == 1 else 0.0

    stepper = LearntStepper(loss)
    ended = locft.train(samples, hparams(max_epochs=9, sit_out_epochs=5), stepper, ignore)
    others = list(range(1, 11))
    assert sorted(stepper.asked[0]) == [0, *others]
    assert sorted(stepper.asked[1]) == [0, *others]
    assert stepper.asked[1][-1] == 0
    assert ended.epoch_losses == pytest.approx([10 / 11, 0.6 / 11, 0.0])


def test_a_run_goes_on_from_any_state(make_model: MakeModel, samples: list[Example]) -> None:
    """With the weights and the optimizer as they were, the rest of the run is the same."""
    states: list[State] = []
    losses = [1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.03]
    whole = locft.train(samples, hparams(), ScriptedStepper(losses), states.append)
    for done, state in enumerate(states, start=1):
        saved = State.model_validate_json(state.model_dump_json())
        rest = locft.train(samples, hparams(), ScriptedStepper(losses[done:]), ignore, saved)
        assert rest == whole
