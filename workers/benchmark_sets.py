"""Benchmark sets of the model-editing field, in their published layouts, as edits.

Owns which field means what; Hugging Face `datasets` reads the files. Knows no model and asks
nothing. Torch-free.

| set | layout | as published by |
|---|---|---|
| zsre | src, alt, rephrase, loc, loc_ans | MEND |
| counterfact | requested_rewrite, paraphrase_prompts, neighborhood_prompts | ROME |
| wikibigedit | update, ans, rephrase, loc, loc_ans | WikiBigEdit |
| each of them | prompt, target_new, rephrase_prompt, locality_prompt, … | EasyEdit, LocFT-BF |
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from workers.contract import EditRecord, LocalityProbe
from workers.errors import WorkersError
from workers.evaluation import edited_prompts

SetName = Literal["zsre", "counterfact", "wikibigedit"]
Fields = Mapping[str, Any]

_FILES = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}


class BadBenchmarkSet(WorkersError):
    """A set that is not there, cannot be read, is empty, or holds a record of another layout."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a set found."""

    records: int
    last: Mapping[str, int]
    """Index of the last record of each fact, by `fact_of` its prompt."""
    conflicting: frozenset[str]
    """Facts that the set gives several targets."""
    edited: frozenset[str]
    """Prompts that some record changes, as `evaluation.judge` takes them."""
    superseded: int
    """How many records give a conflicting fact a target that is not its last."""


class BenchmarkSet:
    """A set in a file or on the hub; every iteration reads it again, as a stream.

    `source` is a `.json`, `.jsonl` or `.parquet` file, or a hub id, `owner/name` or
    `owner/name:split`; without `name` the layout is told by the first record's fields. Raises
    `BadBenchmarkSet`, naming the record, when it is read.
    """

    def __init__(self, source: str, name: SetName | None = None, limit: int | None = None) -> None:
        self.source = source
        self._layouts = LAYOUTS if name is None else PUBLISHED[name]
        self._limit = limit

    def __iter__(self) -> Iterator[EditRecord]:
        """Its records as they are, in order, each with its index from 0 as id."""
        layout = None
        for index, fields in enumerate(islice(_read(self.source), self._limit)):
            layout = layout or self._layout(fields)
            try:
                yield layout.record(str(index), fields)
            except _Misfit as misfit:
                raise BadBenchmarkSet(
                    f"{self.source}, record {index} (from 0): {misfit}"
                ) from misfit
        if layout is None:
            raise BadBenchmarkSet(f"{self.source} holds no records; name a file that does")

    def _layout(self, fields: Fields) -> "Layout":
        for layout in self._layouts:
            if all(name in fields for name in layout.needed):
                return layout
        known = "; or ".join(", ".join(layout.needed) for layout in self._layouts)
        raise BadBenchmarkSet(
            f"{self.source}: its records have the fields {_present(fields)}; a set has {known}"
        )

    @cached_property
    def survey(self) -> Survey:
        """Found by one pass, in memory for the facts' prompts only."""
        targets: dict[str, str] = {}
        last: dict[str, int] = {}
        times = Counter[str]()
        edited: set[str] = set()
        conflicting = set()
        for index, edit in enumerate(self):
            fact = fact_of(edit.prompt)
            if targets.setdefault(fact, edit.target) != edit.target:
                conflicting.add(fact)
            last[fact] = index
            times[fact] += 1
            edited |= edited_prompts((edit,))
        superseded = sum(times[fact] - 1 for fact in conflicting)
        return Survey(times.total(), last, frozenset(conflicting), frozenset(edited), superseded)

    def usable(self) -> Iterator[EditRecord]:
        """The records that can all hold at once.

        Of several targets of one fact the last one counts, as it does in the edit store.
        """
        survey = self.survey
        for index, edit in enumerate(self):
            fact = fact_of(edit.prompt)
            if fact not in survey.conflicting or survey.last[fact] == index:
                yield edit


def fact_of(prompt: str) -> str:
    """What makes two prompts ask for the same fact: all but case and white space."""
    return " ".join(prompt.split()).casefold()


def to_edit_json(record: EditRecord) -> dict[str, Any]:
    """`record` as `POST /edits` takes it; its id goes along as metadata."""
    edit = record.model_dump(exclude={"id"}, exclude_none=True, mode="json")
    return {**edit, "metadata": {"record": record.id}}


class _Misfit(ValueError):
    """What is wrong with a record; said without its source and index."""


@dataclass(frozen=True)
class Layout:
    """One published way to write a record down."""

    needed: tuple[str, ...]
    """Fields without which it is no record of this layout."""
    read: Callable[[str, Fields], EditRecord]

    def record(self, index: str, fields: Fields) -> EditRecord:
        missing = [name for name in self.needed if fields.get(name) is None]
        if missing:
            raise _Misfit(f"lacks {', '.join(missing)}; it has {_present(fields)}")
        return self.read(index, fields)


def _named(prompt: str, target: str, rephrase: str, locality: str, answer: str) -> Layout:
    """The layout of a record with at most one rephrase and one locality prompt, by field names."""

    def read(index: str, fields: Fields) -> EditRecord:
        answers = _texts(fields, answer)
        probes = _texts(fields, locality)
        return EditRecord(
            id=index,
            prompt=_text(fields, prompt),
            target=_text(fields, target),
            subject=next(iter(_texts(fields, "subject")), None),
            rephrases=_texts(fields, rephrase),
            locality=tuple(
                LocalityProbe(prompt=probe, answer=answers[0] if answers else None)
                for probe in probes
            ),
        )

    return Layout((prompt, target), read)


def _counterfact(index: str, fields: Fields) -> EditRecord:
    """A neighbourhood prompt is about another subject with the same true object."""
    rewrite = fields["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise _Misfit(f"requested_rewrite is {rewrite!r}, not an object")
    subject = _text(rewrite, "subject")
    answers = _texts(_inner(rewrite, "target_true"), "str")
    probes = _texts(fields, "neighborhood_prompts")
    return EditRecord(
        id=index,
        prompt=_text(rewrite, "prompt").replace("{}", subject),
        target=_text(_inner(rewrite, "target_new"), "str"),
        subject=subject,
        rephrases=_texts(fields, "paraphrase_prompts"),
        locality=tuple(
            LocalityProbe(prompt=probe, answer=answers[0] if answers else None) for probe in probes
        ),
    )


_MEND = _named("src", "alt", "rephrase", "loc", "loc_ans")
_ROME = Layout(("requested_rewrite",), _counterfact)
_WIKIBIGEDIT = _named("update", "ans", "rephrase", "loc", "loc_ans")
_FLAT = _named(
    "prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth"
)

LAYOUTS = (_MEND, _ROME, _WIKIBIGEDIT, _FLAT)
PUBLISHED: Mapping[SetName, tuple[Layout, ...]] = {
    "zsre": (_MEND, _FLAT),
    "counterfact": (_ROME, _FLAT),
    "wikibigedit": (_WIKIBIGEDIT, _FLAT),
}


def _present(fields: Fields) -> str:
    return ", ".join(name for name, value in fields.items() if value is not None) or "no fields"


def _inner(fields: Fields, name: str) -> Fields:
    value = fields.get(name)
    return value if isinstance(value, Mapping) else {"str": value}


def _text(fields: Fields, name: str) -> str:
    found = _texts(fields, name)
    if not found:
        raise _Misfit(f"{name} is empty")
    return found[0]


def _texts(fields: Fields, name: str) -> tuple[str, ...]:
    """A field's text or list of texts, without outer white space and empty ones."""
    value = fields.get(name)
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    for item in items:
        if not isinstance(item, str):
            raise _Misfit(f"{name} holds {item!r}, which is not a text")
    return tuple(item.strip() for item in items if item.strip())


def _read(source: str) -> Iterator[Fields]:
    """The records of a file or of a set on the hub, as a stream."""
    path = Path(source).expanduser()
    builder = _FILES.get(path.suffix.lower())
    if path.is_file() and builder is not None:
        return _streamed(source, builder, data_files=str(path), split="train")
    if path.exists():
        raise BadBenchmarkSet(f"{source}: name a file that ends in {', '.join(_FILES)}")
    name, _, split = source.partition(":")
    if builder is not None or path.is_absolute() or name.count("/") != 1 or name[0] in "./~":
        raise BadBenchmarkSet(f"{source}: no such file, and no hub id of the form owner/name")
    return _streamed(source, name, split=split or None)


def _streamed(source: str, name: str, split: str | None, **options: Any) -> Iterator[Fields]:
    # Imported here: it takes a second, and brings pandas and pyarrow.
    from datasets import IterableDatasetDict, load_dataset

    try:
        found = load_dataset(name, split=split, streaming=True, **options)
        if isinstance(found, IterableDatasetDict):
            if len(found) > 1:
                first, *_ = found
                raise BadBenchmarkSet(
                    f"{source} has the splits {', '.join(found)}; name one, as {source}:{first}"
                )
            (found,) = found.values()
        yield from found
    except StopIteration:
        return
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadBenchmarkSet(f"{source} cannot be read: {reason}") from error
