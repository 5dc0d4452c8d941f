"""Judges edits by what a version answers: reliability, generalization, locality.

Torch-free, and asks nothing itself: the caller asks `prompts_of` each edit, greedily, and hands
the answers back. Autoregressive exact match, as in the LocFT-BF paper (arXiv 2509.22072).
"""

import re
import string
from collections.abc import Collection, Iterable, Mapping, Sequence

from workers.contract import EditRecord, LocalityProbe, Record

MAX_NEW_TOKENS = 32
STOP = (".", "\n")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Verdict(Record):
    """How one edit came out; None where there was nothing to ask. Shares are 0 to 1."""

    edit_id: str
    reliable: bool
    answer: str
    generalization: float | None
    locality: float | None


def prompts_of(edit: EditRecord) -> tuple[str, ...]:
    """What to ask the new version for an edit: its prompt, its rephrases, its locality prompts."""
    return (edit.prompt, *edit.rephrases, *(probe.prompt for probe in edit.locality))


def parent_prompts_of(edit: EditRecord) -> tuple[str, ...]:
    """What to ask the version before: the locality prompts whose answer the edit does not state."""
    return tuple(probe.prompt for probe in edit.locality if probe.answer is None)


def stop_of(edit: EditRecord) -> tuple[str, ...]:
    """Where an answer to `prompts_of` ends, besides at EOS.

    A full stop ends none of them if one of the right answers, as "U.S.", has it within.
    """
    rights = (edit.target, *(probe.answer or "" for probe in edit.locality))
    return STOP[1:] if any(_inner_stops(right) for right in rights) else STOP


def normalise(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def answer_of(text: str, target: str = "") -> str:
    """The answer in generated `text`: up to the first newline or full stop.

    As many full stops as `target` has within it are passed over, so that "U.S." can be answered.
    """
    line = text.lstrip().split("\n", 1)[0]
    return ".".join(line.split(".")[: _inner_stops(target) + 1]).strip()


def matches(text: str, target: str) -> bool:
    """Normalised exact match of the answer in generated `text`."""
    return normalise(answer_of(text, target)) == normalise(target)


def judge(
    edits: Sequence[EditRecord], after: Mapping[str, str], before: Mapping[str, str]
) -> tuple[Verdict, ...]:
    """One verdict per edit, in order.

    `after` is the new version's text for every prompt of `prompts_of`, `before` the earlier
    version's for those of `parent_prompts_of`. A locality prompt that another edit of the batch
    changes is not counted.
    """
    edited = {_key(prompt) for edit in edits for prompt in (edit.prompt, *edit.rephrases)}
    return tuple(_verdict(edit, after, before, edited) for edit in edits)


def aggregate(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """reliability, generalization and locality in percent, each over the edits that have it."""
    rows = list(verdicts)
    shares = {
        "reliability": [float(row.reliable) for row in rows],
        "generalization": [row.generalization for row in rows if row.generalization is not None],
        "locality": [row.locality for row in rows if row.locality is not None],
    }
    return {name: 100.0 * sum(found) / len(found) for name, found in shares.items() if found}


def _verdict(
    edit: EditRecord,
    after: Mapping[str, str],
    before: Mapping[str, str],
    edited: Collection[str],
) -> Verdict:
    probes = [probe for probe in edit.locality if _key(probe.prompt) not in edited]
    return Verdict(
        edit_id=edit.id,
        reliable=matches(after[edit.prompt], edit.target),
        answer=answer_of(after[edit.prompt], edit.target),
        generalization=_share(matches(after[prompt], edit.target) for prompt in edit.rephrases),
        locality=_share(_kept(probe, after, before) for probe in probes),
    )


def _kept(probe: LocalityProbe, after: Mapping[str, str], before: Mapping[str, str]) -> bool:
    if probe.answer is not None:
        return matches(after[probe.prompt], probe.answer)
    return normalise(answer_of(after[probe.prompt])) == normalise(answer_of(before[probe.prompt]))


def _inner_stops(target: str) -> int:
    return target.rstrip(". ").count(".")


def _share(kept: Iterable[bool]) -> float | None:
    found = list(kept)
    return sum(found) / len(found) if found else None


def _key(prompt: str) -> str:
    return " ".join(prompt.split()).casefold()
