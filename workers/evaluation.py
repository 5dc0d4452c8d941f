"""Judges edits by what a version answers: reliability, generalization, locality.

Torch-free, and asks nothing itself: the caller asks `prompts_of` each edit, greedily, and hands
the answers back. Autoregressive exact match, as in the LocFT-BF paper (arXiv 2509.22072).
"""

import re
import string
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from workers.contract import EditRecord, Format, LocalityProbe, Record
from workers.formats import RAW, Renderings

MAX_NEW_TOKENS = 32
STOP = (".", "\n")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class FormatVerdict(Record):
    """How one edit came out in one prompt format."""

    reliable: bool
    answer: str
    generalization: float | None


class Verdict(Record):
    """How one edit came out; None where there was nothing to ask. Shares are 0 to 1.

    Its own figures are those of the first format asked in, which decides whether an edit is
    applied; locality prompts are asked raw only.
    """

    edit_id: str
    reliable: bool
    answer: str
    generalization: float | None
    locality: float | None
    formats: Mapping[Format, FormatVerdict] = {}
    """In the other formats."""


def prompts_of(edit: EditRecord, renderings: Renderings = RAW) -> tuple[str, ...]:
    """What to ask the new version for an edit, each once.

    Its prompt and its rephrases in every format, its locality prompts as they are.
    """
    asked = (edit.prompt, *edit.rephrases)
    rendered = [render(prompt) for render in renderings.values() for prompt in asked]
    return tuple(dict.fromkeys([*rendered, *(probe.prompt for probe in edit.locality)]))


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


def edited_prompts(edits: Iterable[EditRecord]) -> frozenset[str]:
    """The keys of all prompts that `edits` change, for `judge`."""
    return frozenset(_key(prompt) for edit in edits for prompt in (edit.prompt, *edit.rephrases))


def judge(
    edits: Sequence[EditRecord],
    after: Mapping[str, str],
    before: Mapping[str, str],
    renderings: Renderings = RAW,
    edited: Collection[str] | None = None,
) -> tuple[Verdict, ...]:
    """One verdict per edit, in order.

    `after` is the new version's text for every prompt of `prompts_of`, `before` the earlier
    version's for those of `parent_prompts_of`. A locality prompt that is among `edited` (None:
    that one of `edits` changes) is not counted.
    """
    changed = edited_prompts(edits) if edited is None else edited
    return tuple(_verdict(edit, after, before, renderings, changed) for edit in edits)


def aggregate(verdicts: Iterable[Verdict], earlier: Sequence[Verdict] = ()) -> dict[str, float]:
    """reliability, generalization and locality in percent, each over the edits that have it.

    The first two are in the first format, and again as `reliability.qa` in each other one. With
    verdicts on `earlier` edits also `earlier`, the percentage of them that are still reliable, and
    `earlier_asked`, their number.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        for name, share in _figures(verdict):
            if share is not None:
                found[name].append(float(share))
    metrics = {name: 100.0 * sum(shares) / len(shares) for name, shares in found.items()}
    if earlier:
        still = sum(verdict.reliable for verdict in earlier)
        metrics |= {"earlier": 100.0 * still / len(earlier), "earlier_asked": float(len(earlier))}
    return metrics


def _figures(verdict: Verdict) -> Iterator[tuple[str, float | None]]:
    yield "reliability", verdict.reliable
    yield "generalization", verdict.generalization
    yield "locality", verdict.locality
    for name, other in verdict.formats.items():
        yield f"reliability.{name}", other.reliable
        yield f"generalization.{name}", other.generalization


def _verdict(
    edit: EditRecord,
    after: Mapping[str, str],
    before: Mapping[str, str],
    renderings: Renderings,
    edited: Collection[str],
) -> Verdict:
    probes = [probe for probe in edit.locality if _key(probe.prompt) not in edited]
    found = {name: _in_format(edit, after, render) for name, render in renderings.items()}
    first = found.pop(next(iter(renderings)))
    return Verdict(
        edit_id=edit.id,
        reliable=first.reliable,
        answer=first.answer,
        generalization=first.generalization,
        locality=_share(_kept(probe, after, before) for probe in probes),
        formats=found,
    )


def _in_format(
    edit: EditRecord, after: Mapping[str, str], render: Callable[[str], str]
) -> FormatVerdict:
    text = after[render(edit.prompt)]
    return FormatVerdict(
        reliable=matches(text, edit.target),
        answer=answer_of(text, edit.target),
        generalization=_share(
            matches(after[render(prompt)], edit.target) for prompt in edit.rephrases
        ),
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
