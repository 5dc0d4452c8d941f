"""An edit set that grows: ten extends of 20 edits against a rebuild after each.

An extend starts from the weights before and trains its edits with a sample of earlier ones; a
rebuild starts from the base with all. The demo model, raw prompts. Each extend also trains 10
earlier edits, those that the extend before lost, and 20 unedited facts at their present answers;
learnt samples sit out. The rebuilds train as the paper does. Both end with the same 200 edits.

    python -m tests.benchmarks.growing --json FILE
"""

import random
from collections.abc import Sequence

from service.client import read_jsonl
from tests.benchmarks import demo_model
from tests.benchmarks.demo_model import FOLDER, DemoModel, Tensors
from tests.benchmarks.report import Report, main
from tests.benchmarks.retention import anchors
from workers.contract import EditRecord

EXTENDS = 10
NEW = 20
REHEARSED, ANCHORED = 10, 20
WITHIN = 3.0


def measure() -> Report:
    report = Report(f"{EXTENDS} extends of {NEW} edits against a rebuild after each: demo model")
    demo, edits = DemoModel(), two_hundred()
    plain = demo_model.hparams(formats=["raw"], batch_size=10)
    changes = {"rehearsal": REHEARSED, "sit_out_epochs": 4, "batch_size": 20}
    chosen = plain.model_copy(update=changes)
    facts = anchors(edits)
    live: Tensors = {}
    lost: list[EditRecord] = []
    extend_s, rebuild_s, course = [], [], []
    for number in range(EXTENDS):
        earlier, new = edits[: number * NEW], edits[number * NEW :][:NEW]
        chance = random.Random(number)
        kept = chance.sample(earlier, min(chosen.rehearsal, len(earlier)))
        again = [edit for edit in lost if edit not in kept]
        anchored = chance.sample(facts, ANCHORED)
        samples = demo.samples(chosen, [*new, *again, *kept], anchored)
        extended = demo.edit(chosen, samples, live)
        live = extended.tensors
        rebuilt = demo.edit(plain, demo.samples(plain, [*earlier, *new]), {})
        extend_s.append(extended.total_s)
        rebuild_s.append(rebuilt.total_s)
        lost = demo.lost(live, earlier)
        held = demo.judge(live, earlier or new, chosen)
        course.append({"edits": len(earlier) + NEW, "earlier": held["reliability"], **held})
    old = edits[:-NEW]
    ends = {
        "extends": demo.judge(live, old, chosen),
        "rebuild": demo.judge(rebuilt.tensors, old, chosen),
    }
    compare(report, ends)
    report.add("extends: seconds per new edit", sum(extend_s) / len(edits), "s")
    report.add("rebuilds: seconds per new edit", sum(rebuild_s) / len(edits), "s")
    ratio = sum(extend_s) / sum(rebuild_s)
    report.add("extends over rebuilds, summed", ratio, "x", at_most=0.25)
    report.details |= {"extend seconds": extend_s, "rebuild seconds": rebuild_s, "course": course}
    return report


def compare(report: Report, ends: dict[str, dict[str, float]]) -> None:
    names = {"reliability": "old edits", "locality": "unedited facts"}
    for figure, name in names.items():
        once = ends["rebuild"][figure]
        report.add(f"{name} after one rebuild", once, "%")
        report.add(
            f"{name} after the extends", ends["extends"][figure], "%", at_least=once - WITHIN
        )


def two_hundred() -> Sequence[EditRecord]:
    """The demo's 100 edits and 100 more, of facts that locality is not measured on."""
    first = demo_model.edits()
    used = {edit.prompt for edit in first} | {probe.prompt for probe in demo_model.unedited()}
    facts = [fact for fact in read_jsonl(FOLDER / "facts.jsonl") if fact["prompt"] not in used]
    more = [
        EditRecord(id=f["id"], prompt=f["prompt"], target=f["target_new"], rephrases=f["held_out"])
        for f in facts[: EXTENDS * NEW - len(first)]
    ]
    return [*first, *more]


if __name__ == "__main__":
    main(measure, __doc__)
