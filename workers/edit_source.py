"""Edits out of a file, and a sample of them with unrelated prompts. Torch-free; asks nothing."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from workers.benchmark_sets import BadBenchmarkSet, BenchmarkSet
from workers.contract import EditRecord, LocalityProbe, Record
from workers.json_lines import numbered

_EDIT_FIELDS = ("prompt", "target", "subject", "rephrases", "locality")

Parsed = TypeVar("Parsed", bound=Record)


def read_edits(source: str) -> list[EditRecord]:
    """The edits of a file as `errata edits submit` takes it, or of a benchmark set.

    Raises `BadLine` or `BadBenchmarkSet` naming the line, or what is wrong with the set.
    """
    path = Path(source).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        items = numbered(path)
        if not items:
            raise BadBenchmarkSet(f"{source} holds no edits; name a file that does")
        if {"prompt", "target"} <= items[0][1].keys():
            return [_edit(path, number, item) for number, item in items]
    return list(BenchmarkSet(source).usable())


def read_probes(path: Path) -> list[LocalityProbe]:
    """Unrelated prompts: a file with one JSON object a line, as {"prompt": …}.

    Raises `BadLine` or `BadBenchmarkSet` naming the line.
    """
    if not path.is_file():
        raise BadBenchmarkSet(f"{path}: no such file")
    return [
        _parsed(LocalityProbe, path, number, {"prompt": item.get("prompt")})
        for number, item in numbered(path)
    ]


def sample(edits: Sequence[EditRecord], count: int, seed: int) -> list[EditRecord]:
    """At most `count` of `edits`, drawn by `seed`, in their order."""
    chosen = random.Random(seed).sample(range(len(edits)), min(count, len(edits)))
    return [edits[index] for index in sorted(chosen)]


def with_unrelated(
    edits: Sequence[EditRecord], unrelated: Sequence[LocalityProbe]
) -> list[EditRecord]:
    """The edits with `unrelated` spread over them, and no locality prompt's answer stated.

    So every unrelated prompt is to keep the answer that the unedited model gives.
    """
    return [
        edit.model_copy(
            update={
                "locality": tuple(
                    LocalityProbe(prompt=probe.prompt)
                    for probe in (*edit.locality, *unrelated[place :: len(edits)])
                )
            }
        )
        for place, edit in enumerate(edits)
    ]


def _edit(path: Path, number: int, item: dict[str, Any]) -> EditRecord:
    given = {name: item[name] for name in _EDIT_FIELDS if name in item}
    return _parsed(EditRecord, path, number, {"id": str(number), **given})


def _parsed(kind: type[Parsed], path: Path, number: int, values: dict[str, Any]) -> Parsed:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, entry['loc']))}: {entry['input']!r} is wrong: {entry['msg']}"
            for entry in error.errors()
        )
        raise BadBenchmarkSet(f"{path}, line {number}: {problems}") from error
