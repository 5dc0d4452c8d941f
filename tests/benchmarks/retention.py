"""The demo's 100 edits in every prompt format, with and without retention.

Retention trains 200 other facts along at their present answers; the 200 unedited facts that
locality is measured on are none of them. With the demo's own hyperparameters.

    python -m tests.benchmarks.retention --json FILE
"""

from collections.abc import Sequence

from service.client import read_jsonl
from tests.benchmarks import demo_model
from tests.benchmarks.demo_model import FOLDER, DemoModel, Edited
from tests.benchmarks.report import Report, main
from workers import formats
from workers.contract import Anchor, EditRecord

ANCHORS = 200


def measure() -> Report:
    report = Report("100 edits of the demo model in every prompt format")
    demo, edits = DemoModel(), demo_model.edits()
    chosen = demo_model.hparams()
    ways = {"as it comes": (), "with retention": anchors(edits)}
    for way, kept in ways.items():
        edited = demo.edit(chosen, demo.samples(chosen, edits, kept), {})
        found = demo.judge(edited.tensors, edits, chosen)
        for name in formats.chosen(chosen.formats, demo.tokenizer):
            suffix = "" if name == "raw" else f".{name}"
            reliability = found[f"reliability{suffix}"]
            report.add(f"{way}: reliability, {name}", reliability, "%", at_least=98)
            generalization = found[f"generalization{suffix}"]
            report.add(f"{way}: generalization, {name}", generalization, "%")
        report.add(f"{way}: locality", found["locality"], "%")
        report.add(f"{way}: training", edited.total_s, "s")
        report.details[way] = details(edited)
    return report


def anchors(edits: Sequence[EditRecord]) -> tuple[Anchor, ...]:
    """Facts that are neither edited nor asked, with the answers the model gives now."""
    used = {edit.prompt for edit in edits}
    used |= {probe.prompt for probe in demo_model.unedited()}
    facts = [fact for fact in read_jsonl(FOLDER / "facts.jsonl") if fact["prompt"] not in used]
    return tuple(Anchor(prompt=f["prompt"], answer=f["answer"]) for f in facts[:ANCHORS])


def details(edited: Edited) -> dict[str, object]:
    losses = edited.state.epoch_losses
    return {"epochs": len(losses), "steps": edited.state.steps, "epoch losses": losses}


if __name__ == "__main__":
    main(measure, __doc__)
