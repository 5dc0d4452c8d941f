"""The demo's 100 edits, end to end to the same stopping rule: the project's loop and a plain one.

Both in this process, float32, on all cores, raw prompts as the method's authors train them, batches
of 10; medians of several runs.

    python -m tests.benchmarks.demo_quality --json FILE
"""

import statistics
import time
from typing import Any

from tests.benchmarks import demo_model, plain_loop
from tests.benchmarks.demo_model import DemoModel, Tensors
from tests.benchmarks.report import Report, main

RUNS = 3
FIGURES = ("reliability", "generalization", "locality")


def measure() -> Report:
    report = Report("100 edits of the demo model, end to end: ours against a plain loop")
    demo, edits = DemoModel(), demo_model.edits()
    chosen = demo_model.hparams(formats=["raw"], batch_size=10)
    samples = demo.samples(chosen, edits)
    plain_s, ours_s = [], []
    for _ in range(RUNS):
        tensors, epochs, seconds = plain(demo, samples, chosen)
        plain_s.append(seconds)
        ours = demo.edit(chosen, samples, {})
        ours_s.append(ours.total_s)
    was = demo.judge(tensors, edits, chosen)
    now = demo.judge(ours.tensors, edits, chosen)
    report.add("plain loop", statistics.median(plain_s), "s")
    report.add("ours", statistics.median(ours_s), "s")
    ratio = statistics.median(plain_s) / statistics.median(ours_s)
    report.add("speed", ratio, "x", at_least=3.0)
    for figure in FIGURES:
        report.add(f"{figure}: plain", was[figure], "%")
        report.add(f"{figure}: ours", now[figure], "%", at_least=was[figure] - 1)
    report.details |= {"epochs": {"plain": epochs, "ours": len(ours.state.epoch_losses)}}
    report.details |= {"seconds": {"plain": plain_s, "ours": ours_s}}
    return report


def plain(demo: DemoModel, samples: Any, chosen: Any) -> tuple[Tensors, int, float]:
    model = demo.model({})
    began = time.perf_counter()
    run = plain_loop.train(model, samples, chosen)
    seconds = time.perf_counter() - began
    tensors = {name: model.get_parameter(name).detach() for name in chosen.parameters}
    return tensors, len(run.epoch_losses), seconds


if __name__ == "__main__":
    main(measure, __doc__)
