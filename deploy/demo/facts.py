"""Chooses the demo's facts, phrasings and edits from CounterFact and ParaRel; knows no model."""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LEARNT_PHRASINGS = 5
HELD_OUT_PHRASINGS = 2
MIN_LEARNT_PHRASINGS = 3
MIN_FACTS_PER_ANSWER = 3
MIN_FACTS_PER_RELATION = 20


@dataclass(frozen=True)
class Fact:
    """One known fact: `prompt` is CounterFact's wording, `learnt` and `held_out` are ParaRel's."""

    id: str
    relation: str
    subject: str
    prompt: str
    answer: str
    target_new: str
    learnt: tuple[str, ...]
    held_out: tuple[str, ...]


def read_patterns(folder: Path) -> dict[str, list[str]]:
    """ParaRel patterns that end in [Y], by relation, cut before it: prefixes to complete."""
    patterns: dict[str, list[str]] = {}
    for path in sorted(folder.glob("P*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        texts = (re.sub(r"\s*\.\s*$", "", json.loads(line)["pattern"]) for line in lines)
        prefixes = (text.removesuffix("[Y]").strip() for text in texts if text.endswith("[Y]"))
        usable = (prefix for prefix in prefixes if prefix.count("[X]") == 1)
        patterns[path.stem] = list(dict.fromkeys(usable))
    return patterns


def choose_facts(data: Path, count: int, seed: int) -> list[Fact]:
    """Up to `count` facts of distinct subjects, in the order of a seeded draw."""
    records = json.loads((data / "counterfact/counterfact_5k.json").read_text(encoding="utf-8"))
    patterns = read_patterns(data / "pararel")
    rng = random.Random(seed)
    known = _common_answers(_unambiguous(records, patterns))
    rng.shuffle(known)
    chosen = _common_answers(known[:count])
    answers = _answers_by_relation(chosen)
    return [_fact(record, patterns, answers[record["relation_id"]], rng) for record in chosen]


def choose_edits(
    facts: list[Fact], count: int, unedited: int, seed: int
) -> tuple[list[Fact], list[Fact]]:
    """Of a seeded shuffle, the first `count` facts, to edit, and the next `unedited`, to probe."""
    shuffled = random.Random(seed).sample(facts, len(facts))
    return shuffled[:count], shuffled[count : count + unedited]


def as_edit(fact: Fact) -> dict[str, Any]:
    """The fact's edit, in the form that the HTTP API takes."""
    return {
        "prompt": fact.prompt,
        "target": fact.target_new,
        "subject": fact.subject,
        "rephrases": list(fact.held_out),
        "metadata": {
            "fact_id": fact.id,
            "relation": fact.relation,
            "answer_before": fact.answer,
        },
    }


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_row(fact: Fact) -> dict[str, Any]:
    return asdict(fact)


def _unambiguous(
    records: list[dict[str, Any]], patterns: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """One record a subject, with one answer only, and with enough phrasings besides its own."""
    answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in records:
        answers[record["subject"], record["relation_id"]].add(record["ground_truth"])
    seen: set[str] = set()
    kept = []
    for record in records:
        subject, relation = record["subject"], record["relation_id"]
        if subject in seen or len(answers[subject, relation]) > 1:
            continue
        if "." in record["ground_truth"] or subject not in record["prompt"]:
            continue
        if len(_phrasings(record, patterns)) < MIN_LEARNT_PHRASINGS + HELD_OUT_PHRASINGS:
            continue
        seen.add(subject)
        kept.append(record)
    return kept


def _common_answers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drops rare answers and small relations, so that a model learns to say every answer left."""
    while True:
        relations = Counter(record["relation_id"] for record in records)
        answers = Counter((record["relation_id"], record["ground_truth"]) for record in records)
        kept = [
            record
            for record in records
            if relations[record["relation_id"]] >= MIN_FACTS_PER_RELATION
            and answers[record["relation_id"], record["ground_truth"]] >= MIN_FACTS_PER_ANSWER
        ]
        if len(kept) == len(records):
            return kept
        records = kept


def _answers_by_relation(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    answers: dict[str, set[str]] = defaultdict(set)
    for record in records:
        answers[record["relation_id"]].add(record["ground_truth"])
    return {relation: sorted(found) for relation, found in answers.items()}


def _phrasings(record: dict[str, Any], patterns: dict[str, list[str]]) -> list[str]:
    """The relation's ParaRel phrasings about this subject, without CounterFact's own wording."""
    found = patterns.get(record["relation_id"], [])
    prompts = [pattern.replace("[X]", record["subject"]) for pattern in found]
    return [prompt for prompt in prompts if prompt != record["prompt"]]


def _fact(
    record: dict[str, Any],
    patterns: dict[str, list[str]],
    answers: list[str],
    rng: random.Random,
) -> Fact:
    prompts = _phrasings(record, patterns)
    rng.shuffle(prompts)
    return Fact(
        id=f"cf{record['case_id']}",
        relation=record["relation_id"],
        subject=record["subject"],
        prompt=record["prompt"],
        answer=record["ground_truth"],
        target_new=_target(record, answers, rng),
        learnt=tuple(prompts[HELD_OUT_PHRASINGS:][:LEARNT_PHRASINGS]),
        held_out=tuple(prompts[:HELD_OUT_PHRASINGS]),
    )


def _target(record: dict[str, Any], answers: list[str], rng: random.Random) -> str:
    """CounterFact's target where the model knows it, else another answer of the relation."""
    others = [answer for answer in answers if answer != record["ground_truth"]]
    drawn = rng.choice(others)
    return record["target_new"] if record["target_new"] in others else drawn
