"""Benchmark sets in their published layouts, and what is wrong with files that are none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from workers.benchmark_sets import BadBenchmarkSet, BenchmarkSet, SetName, to_edit_json
from workers.contract import EditRecord, LocalityProbe

ZSRE = {
    "subject": "Charity Creek",
    "src": "Which river system contains Charity Creek?",
    "pred": "Parramatta River",
    "rephrase": "What river system is Charity Creek in?",
    "alt": "Chichester River",
    "answers": ["Parramatta River"],
    "loc": "nq question: how many rings are there",
    "loc_ans": "12",
    "cond": "Parramatta River >> Chichester River",
}
FLAT = {
    "case_id": 1884,
    "prompt": "Reedy Glacier is in",
    "target_new": "Asia",
    "subject": "Reedy Glacier",
    "ground_truth": "Antarctica",
    "rephrase_prompt": "Reedy Glacier is located in the continent",
    "locality_prompt": "Mount Erebus, in",
    "locality_ground_truth": "Antarctica",
}
NESTED = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux spoke the language", "Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is", "Michel Rocard speaks"],
    "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
}
WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Stefan Mair",
    "update": "What position does Stefan Mair hold?",
    "rephrase": "What is the role of Stefan Mair?",
    "ans": "head coach",
    "loc": None,
    "loc_ans": None,
}

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` leaves its lock files there."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes records into a file whose kind its name tells, and returns its path."""

    def written(*records: Any, name: str = "set.json") -> str:
        path = tmp_path / name
        if name.endswith(".parquet"):
            Dataset.from_list(list(records)).to_parquet(path)
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            path.write_text(json.dumps(records))
        return str(path)

    return written


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("record", "name", "expected"),
    [
        (
            ZSRE,
            "zsre",
            EditRecord(
                id="0",
                prompt="Which river system contains Charity Creek?",
                target="Chichester River",
                subject="Charity Creek",
                rephrases=("What river system is Charity Creek in?",),
                locality=(
                    LocalityProbe(prompt="nq question: how many rings are there", answer="12"),
                ),
            ),
        ),
        (
            FLAT,
            "counterfact",
            EditRecord(
                id="0",
                prompt="Reedy Glacier is in",
                target="Asia",
                subject="Reedy Glacier",
                rephrases=("Reedy Glacier is located in the continent",),
                locality=(LocalityProbe(prompt="Mount Erebus, in", answer="Antarctica"),),
            ),
        ),
        (
            NESTED,
            "counterfact",
            EditRecord(
                id="0",
                prompt="The mother tongue of Danielle Darrieux is",
                target="English",
                subject="Danielle Darrieux",
                rephrases=("Danielle Darrieux spoke the language", "Danielle Darrieux, a native"),
                locality=(
                    LocalityProbe(prompt="The mother tongue of Léon Blum is", answer="French"),
                    LocalityProbe(prompt="Michel Rocard speaks", answer="French"),
                ),
            ),
        ),
        (
            WIKIBIGEDIT,
            "wikibigedit",
            EditRecord(
                id="0",
                prompt="What position does Stefan Mair hold?",
                target="head coach",
                subject="Stefan Mair",
                rephrases=("What is the role of Stefan Mair?",),
            ),
        ),
    ],
)
def test_published_layouts(
    write: Write, record: dict[str, Any], name: SetName, expected: EditRecord, suffix: str
) -> None:
    source = write(record, name=f"set.{suffix}")
    assert list(BenchmarkSet(source)) == list(BenchmarkSet(source, name)) == [expected]


def test_the_last_target_of_a_fact_counts(write: Write) -> None:
    again = {**FLAT, "prompt": "reedy  glacier is in", "target_new": "Europe"}
    other = {**FLAT, "prompt": "The Nile is in", "rephrase_prompt": "Mount Erebus, IN"}
    found = BenchmarkSet(write(FLAT, other, again, {**again, "target_new": "Oceania"}, other))
    assert (found.survey.records, found.survey.superseded) == (5, 2)
    assert found.survey.conflicting == {"reedy glacier is in"}
    assert [edit.id for edit in found.usable()] == ["1", "3", "4"]
    assert "mount erebus, in" in found.survey.edited


def test_a_limit(write: Write) -> None:
    found = BenchmarkSet(write(*[FLAT] * 5), limit=2)
    assert [edit.id for edit in found] == ["0", "1"]
    assert found.survey.records == 2


def test_as_the_service_takes_it(write: Write) -> None:
    [record] = BenchmarkSet(write(FLAT))
    assert to_edit_json(record) == {
        "prompt": "Reedy Glacier is in",
        "target": "Asia",
        "subject": "Reedy Glacier",
        "rephrases": ["Reedy Glacier is located in the continent"],
        "locality": [{"prompt": "Mount Erebus, in", "answer": "Antarctica"}],
        "metadata": {"record": "0"},
    }


BAD: list[tuple[list[Any], SetName | None, str]] = [
    ([], None, "holds no records"),
    ([FLAT, {"prompt": "p"}], None, "record 1 (from 0): lacks target_new; it has prompt"),
    ([{"question": "q"}], None, "have the fields question; a set has src, alt; or requested_"),
    ([ZSRE], "wikibigedit", "a set has update, ans; or prompt, target_new"),
    ([FLAT, {**FLAT, "target_new": " "}], None, "record 1 (from 0): target_new is empty"),
    ([{**FLAT, "target_new": 12}], None, "record 0 (from 0): target_new holds 12"),
    ([{**NESTED, "requested_rewrite": "x"}], None, "requested_rewrite is 'x', not an object"),
    ([{"requested_rewrite": {"prompt": "p {}"}}], None, "record 0 (from 0): subject is empty"),
]


@pytest.mark.parametrize(("records", "name", "message"), BAD)
def test_records_of_another_shape(
    write: Write, records: list[Any], name: SetName | None, message: str
) -> None:
    with pytest.raises(BadBenchmarkSet) as caught:
        list(BenchmarkSet(write(*records), name))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("set.json", "", "holds no records"),
        ("set.json", "{not json", "cannot be read"),
        ("set.jsonl", '{"prompt": "p", "target_new": "t"}\n{', "cannot be read"),
        ("set.parquet", "text", "cannot be read"),
        ("set.csv", "a,b", "name a file that ends in .json"),
    ],
)
def test_files_that_are_no_set(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BadBenchmarkSet) as caught:
        list(BenchmarkSet(str(path)))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("source", ["nothing.json", "./a/b", "set", "", "a/b/c"])
def test_a_source_that_is_not_there(source: str) -> None:
    with pytest.raises(BadBenchmarkSet):
        list(BenchmarkSet(source))
