"""The shape of Qwen2.5-72B, with random weights, edited on a single GPU of 141 GB.

    python -m tests.gpu.seventy_two --json FILE
    python -m tests.gpu.seventy_two --scale 0.03 --layers 8 --device cpu

One process, one rank, the project's own ZeRO-3 path. The 19 layers below the tuned one are made,
run over 100 edits and released, one by one; then the edits train on the 61 above. Only those fit:
all 80 are 145 GB. Every figure is beside what `errata plan` says of the same job. `--scale` shrinks
the widths, `--layers` the depth. Needs torch, transformers and DeepSpeed; no Ray, no checkpoint.
"""

import json
import os
import statistics
import time
import warnings
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.benchmarks.report import Report
from tests.gpu import device as on
from tests.gpu import samples
from workers import frozen_prefix, locft, models, presets, zero3
from workers.contract import Hparams
from workers.examples import Example
from workers.locft import State
from workers.models import ModelFacts
from workers.plan import Cluster, Plan, Work, plan
from workers.plan_memory import CONTEXT_BYTES

CONFIG = Path(__file__).parents[2] / "deploy" / "plans" / "qwen2.5-72b.config.json"
SMALL = "python -m tests.gpu.seventy_two --scale 0.03 --layers 8 --device cpu"
TUNED_OF = (19, 80)
HEAD = 128


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = _parser().parse_args(arguments)
    device = on.chosen(chosen.device, SMALL)
    with TemporaryDirectory() as folder:
        facts = _facts(Path(folder), chosen)
        edits = samples.synthetic(chosen.edits, facts.config["vocab_size"])
        planned = _planned(facts, _hparams(chosen), edits, chosen.gpu_memory)
        _join(Path(folder), device)
        try:
            report = measure(facts, planned, edits, device)
        finally:
            dist.destroy_process_group()
    on.finish(report, device, chosen.json)


def _parser() -> ArgumentParser:
    parser = on.parser(__doc__)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--gpu-memory", type=float, default=141.0, help="GB, for the plan")
    parser.add_argument("--scale", type=float, default=1.0, help="of the widths, at most 1")
    parser.add_argument("--layers", type=int, default=80)
    return parser


def _facts(folder: Path, chosen: Namespace) -> ModelFacts:
    """Writes the shape's `config.json`, and reads it as a job does."""
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    heads = max(round(config["num_attention_heads"] * chosen.scale), 1)
    config |= {
        "num_hidden_layers": chosen.layers,
        "max_window_layers": chosen.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 8, 1),
        "hidden_size": heads * HEAD,
        "intermediate_size": round(config["intermediate_size"] * chosen.scale),
        "vocab_size": round(config["vocab_size"] * chosen.scale),
        # What ends a sample; the shape has no tokenizer.
        "bos_token_id": None,
        "eos_token_id": samples.EOS,
    }
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return models.read_facts(file)


def _join(folder: Path, device: torch.device) -> None:
    """A process group of this process alone."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": device.type}
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{folder / 'meeting'}", world_size=1, rank=0)


def measure(
    facts: ModelFacts, planned: Plan, edits: Sequence[Example], device: torch.device
) -> Report:
    report = Report(
        f"{planned.parameters / 1e9:.3g} billion random parameters in {planned.layers} layers, "
        f"{planned.prefix_layers} of them below the tuned one; {len(edits)} edits, {device.type}"
    )
    opened = zero3.open_model(facts, planned.hparams)
    opened.read = RandomWeights(device).read
    with TemporaryDirectory() as folder:
        states = frozen_prefix.HiddenStates(
            edits, facts.hidden_size, torch.bfloat16, 8 << 30, Path(folder) / "prefix"
        )
        on.forget_peak(device)
        began = time.perf_counter()
        zero3.fill_prefix(opened, edits, states)
        seconds = {"prefix": time.perf_counter() - began}
        peaks = {"prefix": on.peak_bytes(device)}
        on.forget_peak(device)
        held, clock, ended = _train(opened, planned.hparams, edits, states)
        peaks["epochs"] = on.peak_bytes(device)
        states.close()
    seconds["epoch"] = statistics.median(clock.seconds)
    _add_memory(report, planned, held, peaks, device)
    _add_time(report, planned, seconds, len(edits))
    report.details["epoch losses"] = ended.epoch_losses
    report.details["epoch seconds"] = clock.seconds
    report.details["plan"] = planned.model_dump(mode="json")
    return report


def _hparams(chosen: Namespace) -> Hparams:
    """The shipped ones of Qwen2.5-72B, but for the layer where there are fewer."""
    layer = chosen.layers * TUNED_OF[0] // TUNED_OF[1]
    changes = {
        "parameters": (f"model.layers.{layer}.mlp.down_proj.weight",),
        "batch_size": chosen.batch_size,
        "max_epochs": chosen.epochs,
        "loss_threshold": 0.0,
        "formats": ("raw",),
    }
    return presets.load(models.read_facts(CONFIG), None, changes)


def _planned(facts: ModelFacts, hparams: Hparams, edits: Sequence[Example], memory: float) -> Plan:
    """Ends the program, with what would help, where the job does not fit."""
    work = Work(
        edits=len(edits),
        tokens_per_edit=round(statistics.mean(len(edit) for edit in edits)),
        target_tokens=round(statistics.mean(len(edit.target) for edit in edits)),
    )
    planned = plan(facts, hparams, Cluster(gpus=1, gpu_memory_gb=memory), work)
    if not planned.fits:
        raise SystemExit(
            f"--gpu-memory {memory:g}: the job takes {planned.gpu_peak_bytes / on.GB:.1f} GB, most "
            f"of it {planned.largest}; it would fit with {' or '.join(planned.remedies)}"
        )
    return planned


class RandomWeights:
    """Stands in for a checkpoint: made where they are used, the same at each call.

    Norms are 1, biases 0, all else as a new model's (normal, 0.02).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self, name: str, start: int, end: int) -> Tensor:
        """Elements `[start, end)` of the parameter, flat."""
        flat = torch.empty(end - start, dtype=torch.bfloat16, device=self._device)
        if name.endswith("bias"):
            return flat.zero_()
        if "norm" in name:
            return flat.fill_(1.0)
        generator = torch.Generator(self._device).manual_seed(
            zlib.crc32(f"{name} {start}".encode())
        )
        return flat.normal_(0.0, 0.02, generator=generator)


class _Clock:
    """Each epoch's seconds, out of the loop's states."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = time.perf_counter()

    def __call__(self, state: State) -> None:
        if state.epoch_ended:
            now = time.perf_counter()
            self.seconds.append(now - self._began)
            self._began = now


def _train(
    opened: zero3.PartitionedModel, hparams: Hparams, edits: Sequence[Example], states: Any
) -> tuple[int, _Clock, State]:
    """Bytes of the suffix's weights, the clock, and how the run ended."""
    suffix = opened.suffix()
    stepper = zero3.Zero3Stepper(suffix, opened, hparams, states)
    parameters: list[Any] = list(suffix.parameters())
    held = sum(parameter.ds_tensor.nbytes for parameter in parameters)
    clock = _Clock()
    ended = locft.train(edits, hparams, stepper, clock)
    return held, clock, ended


def _add_memory(
    report: Report, planned: Plan, held: int, peaks: Mapping[str, int], device: torch.device
) -> None:
    """CUDA's own memory is in the plan and in nothing that torch measures."""
    weights = planned.gpu_memory["frozen suffix weights"] + planned.gpu_memory["tuned weights"]
    expected = {
        "prefix": sum(planned.gpu_memory_prefix.values()) - CONTEXT_BYTES,
        "epochs": sum(planned.gpu_memory.values()) - CONTEXT_BYTES,
    }
    report.add("suffix weights: held", held / on.GB, "GB")
    report.add("suffix weights: planned", weights / on.GB, "GB")
    for phase, most in expected.items():
        if device.type == "cuda":
            report.add(f"{phase}: peak memory", peaks[phase] / on.GB, "GB")
        report.add(f"{phase}: planned", most / on.GB, "GB")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        report.add("device: in use, CUDA's own with it", (total - free) / on.GB, "GB")
        report.add("device: planned", planned.gpu_peak_bytes / on.GB, "GB")
    else:
        report.add("process: peak memory, libraries with it", peaks["epochs"] / on.GB, "GB")


def _add_time(report: Report, planned: Plan, seconds: Mapping[str, float], edits: int) -> None:
    speed = planned.speed
    at = f"at {speed.efficiency:.0%} of {speed.peak_tflops:g} TFLOP/s"
    report.add("prefix, with the making of its weights", seconds["prefix"], "s")
    report.add(f"prefix: planned {at}", planned.duration.prefix, "s")
    report.add("edit-epoch", seconds["epoch"] / edits, "s")
    report.add(f"edit-epoch: planned {at}", planned.duration.edit_epoch, "s")


if __name__ == "__main__":
    main()
