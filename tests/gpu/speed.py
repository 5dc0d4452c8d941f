"""LocFT-BF's loop on a GPU against a plain loop that does what the public code does.

A random-weight Llama or Qwen2.5 shape, 500 made-up edits of CounterFact's lengths, batches of 100:

    python -m tests.gpu.speed --shape llama-8b --json FILE
    python -m tests.gpu.speed --shape qwen2.5-7b --layer 6
    python -m tests.gpu.speed --shape tiny --edits 40 --batch-size 10 --device cpu

Three sides, one after the other from the same values in the same batches: ours (frozen prefix,
packed suffix, bfloat16 with a float32 master of the tuned tensor); the plain loop with everything
in bfloat16, which the public code does not do, and which rounds small steps away, so that only its
time and memory count; the plain loop in float32, as the public code runs. Each holds the whole
model. Needs torch, transformers and what DeepSpeed brings along; neither Ray nor a tokenizer.
"""

import statistics
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks import fast_loop, plain_loop
from tests.benchmarks.plain_loop import Run
from tests.benchmarks.report import Report
from tests.gpu import device as on
from tests.gpu import samples, shapes
from workers.contract import Hparams
from workers.examples import Example

SMALL = "python -m tests.gpu.speed --shape tiny --edits 40 --batch-size 10 --device cpu"


@dataclass(frozen=True)
class Side:
    run: Run
    peak_bytes: int

    @property
    def epoch_s(self) -> float:
        return statistics.median(self.run.seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = on.parser(__doc__)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-8b")
    parser.add_argument("--layer", type=int, help="the tuned one; usually the paper's")
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=100)
    chosen = parser.parse_args(arguments)
    layers = shapes.layers_of(chosen.shape)
    if chosen.layer is None:
        chosen.layer = shapes.tuned_layer(chosen.shape)
    if not 0 <= chosen.layer < layers:
        parser.error(f"--layer {chosen.layer}: {chosen.shape} has layers 0 to {layers - 1}")
    device = on.chosen(chosen.device, SMALL)
    on.finish(measure(chosen, device), device, chosen.json)


def measure(chosen: Namespace, device: torch.device) -> Report:
    report = Report(
        f"{chosen.shape}, layer {chosen.layer} tuned, {chosen.edits} edits, "
        f"batches of {chosen.batch_size}, {device.type}"
    )
    hparams = Hparams(
        parameters=(f"model.layers.{chosen.layer}.mlp.down_proj.weight",),
        learning_rate=5e-4,
        batch_size=chosen.batch_size,
        max_epochs=chosen.epochs,
        loss_threshold=0.0,
        dtype="bfloat16",
    )
    model = shapes.make(chosen.shape, device, torch.bfloat16)
    edits = samples.synthetic(chosen.edits, model.config.vocab_size)
    read = [len(sample) for sample in edits]
    report.details["tokens read per sample"] = {"mean": statistics.mean(read), "max": max(read)}
    _warm_up(model, edits, hparams)
    ours = _side(model, hparams, lambda: fast_loop.train(model, edits, hparams, chosen.layer))
    half = _side(model, hparams, lambda: plain_loop.train(model, edits, hparams))
    model.float()
    plain = _side(model, hparams, lambda: plain_loop.train(model, edits, hparams))
    compare(report, ours, half, plain, device)
    return report


def _warm_up(model: Any, edits: Sequence[Example], hparams: Hparams) -> None:
    """The first calls choose kernels; none of the sides is to be charged for it."""
    once = hparams.model_copy(update={"max_epochs": 1})
    first = edits[: hparams.batch_size]
    _side(model, once, lambda: plain_loop.train(model, first, once))


def _side(model: Any, hparams: Hparams, run: Callable[[], Run]) -> Side:
    """One side, after which the tuned tensor is what it was before."""
    [name] = hparams.parameters
    weight = model.get_parameter(name)
    before = weight.detach().clone()
    on.forget_peak(weight.device)
    side = Side(run(), on.peak_bytes(weight.device))
    with torch.no_grad():
        weight.copy_(before)
    weight.grad = None
    return side


def compare(report: Report, ours: Side, half: Side, plain: Side, device: torch.device) -> None:
    sides = {"ours": ours, "plain, bfloat16": half, "plain, float32": plain}
    for name, side in sides.items():
        report.add(f"{name}: epoch", side.epoch_s, "s")
    report.add("ours: prefix, once", ours.run.prefix_s, "s")
    for name, side in list(sides.items())[1:]:
        report.add(f"speed per epoch over {name}", side.epoch_s / ours.epoch_s, "x")
        whole = ours.run.prefix_s + 25 * ours.epoch_s
        report.add(f"speed over {name}, 25 epochs and prefix", 25 * side.epoch_s / whole, "x")
    if device.type == "cuda":
        for name, side in sides.items():
            report.add(f"{name}: peak memory", side.peak_bytes / on.GB, "GB")
    pairs = list(zip(plain.run.epoch_losses, ours.run.epoch_losses, strict=True))
    for epoch, (expected, found) in ((1, pairs[0]), (len(pairs), pairs[-1])):
        report.add(f"epoch {epoch}: loss against plain, float32", abs(found - expected) / expected)
    report.details["batch losses"] = {name: side.run.losses for name, side in sides.items()}
    report.details["epoch losses"] = {name: side.run.epoch_losses for name, side in sides.items()}
    report.details["epoch seconds"] = {name: side.run.seconds for name, side in sides.items()}


if __name__ == "__main__":
    main()
