"""The method in one process: what is tuned, what is learnt, when it stops."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerFast

from workers import examples, locft, models, zero3
from workers.contract import EditRecord, Hparams
from workers.errors import BadHparams, TrainingFailed, UnknownParameter
from workers.examples import IGNORED, Example
from workers.locft import LocalStepper, Position, SampleLosses
from workers.progress import ignore

TUNED = "model.layers.1.mlp.down_proj.weight"

MakeModel = Callable[..., Any]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def samples(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    edits = [
        EditRecord(id=f"ed_{number}", prompt="Fact " * (1 + number % 3), target=f"is {number}")
        for number in range(11)
    ]
    return examples.tokenize(edits, tokenizer, context=128)


def hparams(**changes: Any) -> Hparams:
    values = {"parameters": (TUNED,), "learning_rate": 1e-2, "batch_size": 4, "max_epochs": 3}
    return Hparams.model_validate({**values, **changes})


def read_nothing(name: str, start: int, end: int) -> torch.Tensor:
    raise AssertionError(f"{name} [{start}, {end})")


def test_a_parents_tensor_must_be_tuned_again(make_model: MakeModel) -> None:
    """Or the new version would silently have the base model's value of it."""
    model = make_model()
    locft.freeze(model, [TUNED])
    other = "model.layers.2.mlp.down_proj.weight"
    with pytest.raises(BadHparams, match=rf"{other}, which this job does not tune"):
        zero3.overwrite(model, [other], read_nothing)


NAMES = [f"model.layers.{layer}.mlp.down_proj.{kind}" for layer in (2, 20) for kind in "wb"]


def test_a_layer_never_selects_another_that_begins_alike() -> None:
    assert locft.select(NAMES, ["model.layers.2"]) == NAMES[:2]


def test_names_are_exact_and_in_the_models_order() -> None:
    wanted = [NAMES[2], "model.layers.2.mlp"]
    assert locft.select(NAMES, wanted) == NAMES[:3]


@pytest.mark.parametrize("wanted", ["layers.2", "model.layers.2.mlp.down", "model.layers.2.", ""])
def test_an_unknown_name_is_refused_with_close_ones(wanted: str) -> None:
    with pytest.raises(UnknownParameter, match=r"the model has no .*close to it: model\.layers"):
        locft.select(NAMES, [wanted])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_selected_tensor_changes(
    make_model: MakeModel, samples: list[Example], dtype: str
) -> None:
    model = make_model(getattr(torch, dtype))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = hparams(dtype=dtype)
    outcome = locft.train(samples, chosen, LocalStepper(model, chosen), ignore)
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
    locft.train(samples, chosen, LocalStepper(model, chosen), ignore)
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
    outcome = locft.train(samples, chosen, LocalStepper(ours, chosen), ignore)
    assert outcome.epoch_losses == pytest.approx(plain_loop(plain, samples, chosen), abs=1e-5)
    assert outcome.steps == 21
    torch.testing.assert_close(
        ours.get_parameter(TUNED), plain.get_parameter(TUNED), atol=1e-5, rtol=0
    )


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "bos_token_id": 1,
}


@pytest.mark.parametrize("architecture", models.SUPPORTED)
def test_sample_losses_are_those_of_whole_logits(architecture: str, samples: list[Example]) -> None:
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    config = model_class.config_class(**SIZES)
    model = model_class(config).eval()
    found = SampleLosses(model)(examples.collate(samples[:4]))
    expected = torch.stack([sample_loss(model, example) for example in samples[:4]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class ScriptedStepper:
    """Says the losses it is given, and counts the steps."""

    def __init__(self, losses: Sequence[float]) -> None:
        self._losses = iter(losses)
        self.stepped: list[float] = []
        self._last = math.nan

    def loss(self, batch: Sequence[Example]) -> float:
        assert batch
        self._last = next(self._losses)
        return self._last

    def step(self) -> None:
        self.stepped.append(self._last)


def test_a_learnt_batch_takes_no_step_and_a_learnt_epoch_is_the_last(
    samples: list[Example],
) -> None:
    stepper = ScriptedStepper([1.0, 0.001, 0.5, 0.01, 0.009, 0.002])
    outcome = locft.train(samples, hparams(max_epochs=9), stepper, ignore)
    assert stepper.stepped == [1.0, 0.5, 0.01]
    assert outcome.steps == 3
    assert outcome.epoch_losses == pytest.approx([5.504 / 11, 0.082 / 11])


def test_positions_tell_where_the_loop_stands(samples: list[Example]) -> None:
    seen: list[Position] = []
    locft.train(samples, hparams(max_epochs=1), ScriptedStepper([3.0, 0.0, 1.0]), seen.append)
    assert [(at.epoch, at.step, at.samples, at.epoch_ended) for at in seen] == [
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
    with pytest.raises(TrainingFailed, match=f"loss is {loss} in epoch 1 .* edits {names};"):
        locft.train(samples, hparams(), stepper, ignore)
    assert stepper.stepped == [1.0]


def test_ignored_labels_have_no_loss(make_model: MakeModel, samples: list[Example]) -> None:
    model = make_model()
    batch = examples.collate(samples[:1])
    cut = batch.labels_BT.clone()
    cut[0, -1] = IGNORED
    without_eos = examples.Batch(batch.input_ids_BT, batch.attention_mask_BT, cut)
    shorter = Example("1", samples[0].prompt, samples[0].target[:-1])
    found = SampleLosses(model)(without_eos)
    torch.testing.assert_close(found[0], sample_loss(model, shorter), atol=1e-5, rtol=0)
