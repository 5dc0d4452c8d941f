"""One job over 100,000 edits against one over 1,000: seconds per edit and epoch, and memory.

The demo model on two ranks of Ray Train and ZeRO-3, as the service trains. CounterFact-like edits,
generated: every subject of the demo's facts in every phrasing of its relations, with an answer of
the relation drawn by seed. The threshold is 0, so both run to the end of their epochs. The frozen
prefix's hidden states exceed their memory budget in the larger job and are in files.

    python -m tests.benchmarks.scale --json FILE
"""

import json
import random
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray

from service.client import read_jsonl
from service.edits import fact_key
from service.settings import DEMO_MODEL
from tests.benchmarks.report import Report, main
from workers import job, models
from workers.contract import EditRecord, Hparams, Progress, TrainRequest

TUNED = "model.layers.2.mlp.down_proj.weight"
EPOCHS = {1_000: 20, 100_000: 2}
CACHE_BYTES = 200 << 20
MIB = 1 << 20


def measure() -> Report:
    report = Report("One job over 100,000 edits: demo model, two ranks, batch 100")
    ray.init(num_cpus=4, include_dashboard=True, log_to_driver=False)
    found = {}
    with TemporaryDirectory() as folder:
        for count, epochs in EPOCHS.items():
            found[count] = run(Path(folder), count, epochs)
    ray.shutdown()
    small, large = (found[count]["seconds per edit-epoch"] for count in EPOCHS)
    report.add("1,000 edits: per edit and epoch", 1e3 * small, "ms")
    report.add("100,000 edits: per edit and epoch", 1e3 * large, "ms")
    report.add("100,000 over 1,000", large / small, "x", at_most=1.15)
    rss = [memory for _, memory in found[100_000]["memory"]]
    quarter = len(rss) // 4
    early, late = statistics.median(rss[:quarter]), statistics.median(rss[-quarter:])
    report.add("100,000 edits: a rank's memory, first quarter", early / MIB, "MiB")
    report.add("100,000 edits: a rank's memory, last quarter", late / MIB, "MiB")
    report.add("last over first quarter", late / early, "x", at_most=1.05)
    report.details |= {str(count): value for count, value in found.items()}
    return report


def run(folder: Path, count: int, epochs: int) -> dict[str, Any]:
    told = folder / f"progress-{count}.jsonl"
    request = TrainRequest(
        job_id=f"job_{count}",
        version_id=f"v{count}",
        parent_id=None,
        model=str(DEMO_MODEL),
        base_fingerprint=models.fingerprint(DEMO_MODEL),
        version_store=str(folder / "store"),
        hparams=Hparams(
            parameters=(TUNED,),
            learning_rate=1e-3,
            batch_size=100,
            max_epochs=epochs,
            loss_threshold=0.0,
            formats=("raw",),
        ),
        edits=generated(count),
        workers=2,
        cache_budget_bytes=CACHE_BYTES,
        scratch_dir=str(folder / "scratch"),
    )
    result = job.train(request, listener(told))
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    ends = [row["elapsed"] for row in rows if row["done"] == count]
    spent = [after - before for before, after in pairwise([0.0, *ends])]
    return {
        "seconds per edit-epoch": statistics.median(spent) / count,
        "epoch seconds": spent,
        "stages": dict(result.seconds),
        "epoch losses": result.epoch_losses,
        "memory": [(row["elapsed"], row["rss"]) for row in rows],
    }


def listener(file: Path) -> Callable[[Progress], None]:
    """Defined within a function, so that it is pickled by value; runs in rank 0."""

    def listen(progress: Progress) -> None:
        import psutil

        row = {
            "elapsed": progress.seconds_elapsed,
            "done": progress.edits_done,
            "rss": psutil.Process().memory_info().rss,
        }
        with file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    return listen


def generated(count: int) -> Sequence[EditRecord]:
    """`count` edits with prompts of their own, in a seeded order."""
    facts = read_jsonl(DEMO_MODEL.parent / "facts.jsonl")
    subjects = list(dict.fromkeys(fact["subject"] for fact in facts))
    patterns: dict[str, str] = {}
    answers: dict[str, list[str]] = {}
    for fact in facts:
        answers.setdefault(fact["relation"], []).append(fact["answer"])
        for text in (fact["prompt"], *fact["learnt"], *fact["held_out"]):
            if fact["subject"] in text:
                patterns[text.replace(fact["subject"], "[X]")] = fact["relation"]
    rng = random.Random(0)
    pairs = [(subject, pattern) for pattern in patterns for subject in subjects]
    edits: dict[str, EditRecord] = {}
    for subject, pattern in rng.sample(pairs, len(pairs)):
        prompt, target = pattern.replace("[X]", subject), rng.choice(answers[patterns[pattern]])
        edit = EditRecord(id=f"ed_{len(edits)}", prompt=prompt, target=target)
        edits.setdefault(fact_key(prompt), edit)
        if len(edits) == count:
            break
    assert len(edits) == count, f"only {len(edits)} prompts can be made"
    return list(edits.values())


if __name__ == "__main__":
    main(measure, __doc__)
