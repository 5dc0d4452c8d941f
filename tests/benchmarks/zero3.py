"""ZeRO-3 over two ranks against one process on the same two cores, at equal total batch.

The model of `edit_speed` (107 million parameters) from safetensors, 200 CounterFact edits, tuned at
layer 17. Three sides: one process with two threads; two gloo ranks with one thread each, with the
frozen prefix run once; the same with every layer in every step. Bytes are those on the loopback
interface, all there is between the ranks; memory is each rank's peak beyond its imports.

    python -m tests.benchmarks.zero3 --json FILE
"""

import importlib
import json
import os
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.benchmarks import edit_speed, fast_loop
from tests.benchmarks.plain_loop import Run
from tests.benchmarks.report import Report, main
from workers import frozen_prefix, locft, models, zero3
from workers.contract import Hparams
from workers.examples import Example
from workers.plan import Cluster, Work, plan

LAYER = 17
EDITS = 200
HPARAMS = Hparams(
    parameters=(f"model.layers.{LAYER}.mlp.down_proj.weight",),
    learning_rate=5e-4,
    max_epochs=3,
    loss_threshold=0.0,
)
MIB = 1 << 20


def measure() -> Report:
    report = Report(
        "ZeRO-3 over two ranks against one process: 24 layers of 512, 200 edits, layer 17"
    )
    samples = edit_speed.counterfact()[:EDITS]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save(path)
        torch.set_num_threads(2)
        alone = fast_loop.train(edit_speed.model(), samples, HPARAMS, LAYER)
        cached = two_ranks(Path(folder), path, samples, LAYER)
        uncached = two_ranks(Path(folder), path, samples, 0)
        compare(report, alone, cached, uncached)
        memory(report, path, cached, samples)
    return report


def save(path: Path) -> None:
    edit_speed.model().save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).write_bytes((edit_speed.DEMO_MODEL / file).read_bytes())


def two_ranks(
    folder: Path, path: Path, samples: Sequence[Example], depth: int
) -> list[dict[str, Any]]:
    """What each rank measured."""
    meeting = folder / f"meeting-{depth}"
    mp.spawn(rank_main, (folder, meeting, path, samples, depth), nprocs=2)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def rank_main(
    rank: int, folder: Path, meeting: Path, path: Path, samples: Sequence[Example], depth: int
) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    importlib.import_module("deepspeed")
    importlib.import_module("transformers.models.llama.modeling_llama")
    dist.init_process_group("gloo", f"file://{meeting}", world_size=2, rank=rank)
    before = peak_bytes()
    run, moved = Run(), []
    began = time.perf_counter()
    opened = zero3.open_model(models.check(path), HPARAMS, depth=depth)
    mine = zero3.owned(samples)
    states = frozen_prefix.HiddenStates(
        mine, edit_speed.WIDTH, torch.float32, 1 << 30, folder / "prefix"
    )
    zero3.fill_prefix(opened, mine, states)
    run.prefix_s = time.perf_counter() - began
    stepper = zero3.Zero3Stepper(opened.suffix(), opened, HPARAMS, states)
    clock, start = fast_loop.Clock(run), loopback_bytes()

    def watch(state: locft.State) -> None:
        clock(state)
        if state.epoch_ended:
            moved.append(loopback_bytes() - start - sum(moved))

    locft.train(samples, HPARAMS, stepper, watch)
    found = {"seconds": run.seconds, "prefix_s": run.prefix_s, "losses": run.losses}
    found |= {"bytes": moved, "peak": peak_bytes() - before}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def loopback_bytes() -> int:
    """Sent over the loopback interface so far, by anyone on this machine."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    [line] = [line for line in lines if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def compare(
    report: Report, alone: Run, cached: list[dict[str, Any]], uncached: list[dict[str, Any]]
) -> None:
    one, two, plain = (
        statistics.median(seconds)
        for seconds in (alone.seconds, cached[0]["seconds"], uncached[0]["seconds"])
    )
    moved, all_moved = (statistics.median(side[0]["bytes"]) for side in (cached, uncached))
    pairs = zip(alone.losses, cached[0]["losses"], strict=True)
    report.add("one process: epoch", one, "s")
    report.add("two ranks: epoch", two, "s")
    report.add("two ranks: time over one process's", two / one, "x")
    report.add("two ranks, no prefix cache: epoch", plain, "s")
    report.add("prefix cache: speed under ZeRO-3", plain / two, "x")
    report.add("two ranks: moved per epoch", moved / MIB, "MiB")
    report.add("two ranks, no prefix cache: moved per epoch", all_moved / MIB, "MiB")
    report.add("prefix cache: bytes saved", 100 * (1 - moved / all_moved), "%")
    worst = max(abs(a - b) / a for a, b in pairs)
    report.add("loss difference, worst batch", worst, at_most=1e-4)
    report.details |= {"two ranks": cached, "two ranks, no prefix cache": uncached}


def memory(
    report: Report, path: Path, cached: list[dict[str, Any]], samples: Sequence[Example]
) -> None:
    work = Work(edits=EDITS, tokens_per_edit=round(statistics.mean(map(len, samples))))
    hparams = HPARAMS.model_copy(update={"formats": ("raw",)})
    planned = plan(models.check(path), hparams, Cluster(gpus=2, gpu_memory_gb=24), work)
    whole = path.joinpath("model.safetensors").stat().st_size
    for phase, kinds in (("training", planned.gpu_memory), ("prefix", planned.gpu_memory_prefix)):
        report.details[f"planned while {phase}"] = dict(kinds)
    report.details["planned on the host"] = dict(planned.host_memory)
    report.add("the model's weights", whole / MIB, "MiB")
    for rank, found in enumerate(cached):
        report.add(f"rank {rank}: peak memory beyond its imports", found["peak"] / MIB, "MiB")
    kinds = {kind: size for kind, size in planned.gpu_memory.items() if kind != "CUDA context"}
    report.add("planned for a rank's training", sum(kinds.values()) / MIB, "MiB")


if __name__ == "__main__":
    main(measure, __doc__)
