"""Answers judged: reliability, generalization, locality."""

import pytest

from workers import evaluation
from workers.contract import EditRecord, LocalityProbe
from workers.evaluation import FormatVerdict, Verdict
from workers.formats import Renderings

EDIT = EditRecord(
    id="ed_1",
    prompt="The capital of France is",
    target="Lyon",
    rephrases=("France's capital is", "The seat of France's government is"),
    locality=(
        LocalityProbe(prompt="The capital of Spain is", answer="Madrid"),
        LocalityProbe(prompt="The Rhine is"),
    ),
)
AFTER = {
    "The capital of France is": " Lyon.",
    "France's capital is": " the lyon\nAnd",
    "The seat of France's government is": " Paris",
    "The capital of Spain is": " Madrid. It",
    "The Rhine is": " a lake",
}


def test_prompts() -> None:
    assert evaluation.prompts_of(EDIT) == tuple(AFTER)
    assert evaluation.parent_prompts_of(EDIT) == ("The Rhine is",)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Lyon. It is", "Lyon"),
        ("\n Lyon\nIt is", "Lyon"),
        (" the U.S.A", "the U"),
        ("", ""),
    ],
)
def test_an_answer_ends_at_a_full_stop_or_newline(text: str, answer: str) -> None:
    assert evaluation.answer_of(text) == answer


@pytest.mark.parametrize(
    ("text", "target", "same"),
    [
        (" Lyon. It is", "Lyon", True),
        (" the  LYON!", "lyon", True),
        (" Lyons", "Lyon", False),
        (" Lyon in France", "Lyon", False),
        (" U.S. It is", "U.S.", True),
        (" U.K. It is", "U.S.", False),
        (" J.R.R. Tolkien. He", "J.R.R. Tolkien", True),
        (" Acme Inc. It", "Acme Inc.", True),
        ("", "Lyon", False),
    ],
)
def test_exact_match_up_to_case_articles_and_punctuation(
    text: str, target: str, same: bool
) -> None:
    assert evaluation.matches(text, target) is same


@pytest.mark.parametrize(
    ("target", "probe", "stop"),
    [
        ("Lyon", "Madrid", (".", "\n")),
        ("Acme Inc.", None, (".", "\n")),
        ("U.S.", None, ("\n",)),
        ("Lyon", "J. R. Smith", ("\n",)),
    ],
)
def test_a_full_stop_within_a_right_answer_does_not_end_it(
    target: str, probe: str | None, stop: tuple[str, ...]
) -> None:
    asked = EditRecord(
        id="ed_1", prompt="p", target=target, locality=(LocalityProbe(prompt="q", answer=probe),)
    )
    assert evaluation.stop_of(asked) == stop


def test_verdict() -> None:
    [verdict] = evaluation.judge([EDIT], AFTER, {"The Rhine is": " a river"})
    assert verdict == Verdict(
        edit_id="ed_1", reliable=True, answer="Lyon", generalization=0.5, locality=0.5
    )
    [verdict] = evaluation.judge([EDIT], AFTER, {"The Rhine is": " a lake. So"})
    assert verdict.locality == 1.0


def test_a_probe_that_another_edit_of_the_batch_changes_does_not_count() -> None:
    other = EditRecord(id="ed_2", prompt="the rhine  is", target="dry")
    after = {**AFTER, other.prompt: " wet"}
    first, second = evaluation.judge([EDIT, other], after, {"The Rhine is": " a river"})
    assert first.locality == 1.0
    assert second == Verdict(
        edit_id="ed_2", reliable=False, answer="wet", generalization=None, locality=None
    )


def test_every_format_has_its_own_verdict_and_locality_is_asked_raw() -> None:
    asks: Renderings = {"raw": str, "qa": "Q: {} A:".format}
    prompts = evaluation.prompts_of(EDIT, asks)
    assert prompts == (
        *tuple(AFTER)[:3],
        *(f"Q: {prompt} A:" for prompt in tuple(AFTER)[:3]),
        *tuple(AFTER)[3:],
    )
    after = {**dict.fromkeys(prompts, " Paris"), **AFTER, "Q: France's capital is A:": " Lyon"}
    [verdict] = evaluation.judge([EDIT], after, {"The Rhine is": " a lake"}, asks)
    assert (verdict.reliable, verdict.locality) == (True, 1.0)
    assert verdict.formats == {
        "qa": FormatVerdict(reliable=False, answer="Paris", generalization=0.5)
    }
    metrics = evaluation.aggregate([verdict], earlier=[verdict, verdict])
    assert metrics == {
        "reliability": 100,
        "generalization": 50,
        "locality": 100,
        "reliability.qa": 0,
        "generalization.qa": 50,
        "earlier": 100,
        "earlier_asked": 2,
    }


def test_a_prompt_that_is_there_twice_is_asked_once() -> None:
    twice = EditRecord(
        id="ed_1", prompt="p", target="t", rephrases=("p",), locality=(LocalityProbe(prompt="p"),)
    )
    assert evaluation.prompts_of(twice) == ("p",)


def test_aggregates_are_percentages_over_the_edits_that_have_them() -> None:
    rows = [
        Verdict(edit_id="1", reliable=True, answer="", generalization=0.5, locality=None),
        Verdict(edit_id="2", reliable=False, answer="", generalization=1.0, locality=None),
        Verdict(edit_id="3", reliable=True, answer="", generalization=None, locality=None),
    ]
    assert evaluation.aggregate(rows) == pytest.approx(
        {"reliability": 200 / 3, "generalization": 75.0}
    )
    assert evaluation.aggregate([]) == {}
