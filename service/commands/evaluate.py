"""`errata eval`: how well a version answers — its own edits, a benchmark set, general tasks.

Owns the options and the tables; asks through `service.interview` and `service.capability`.
"""

import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from service.capability import Harness
from service.client import JSON, Client
from service.display import console, table
from service.errors import InvalidInput
from service.interview import Interview
from workers import formats as prompt_formats
from workers import models
from workers.benchmark_sets import BenchmarkSet, SetName
from workers.contract import EditRecord, Format
from workers.errors import UnsupportedModel
from workers.evaluation import Verdict, aggregate, edited_prompts
from workers.formats import RAW, Renderings

SLICE = 512
"""Records asked about, and held in memory, at a time."""

SetChoice = Literal["auto", SetName]


def evaluate(
    version: Annotated[str | None, typer.Option(help="v12; none: the committed one.")] = None,
    compare: Annotated[str | None, typer.Option(help="Ask this version too.")] = None,
    job: Annotated[str | None, typer.Option(help="Of the version's edits, those of a job.")] = None,
    all_edits: Annotated[bool, typer.Option("--all", help="All that the version holds.")] = False,
    source: Annotated[
        str | None, typer.Option("--from", help="A benchmark set: a file or a hub id.")
    ] = None,
    set_name: Annotated[SetChoice, typer.Option("--set", help="Its layout.")] = "auto",
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness: T1,T2.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="A directory with tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="How many records at most.")] = None,
    formats: Annotated[
        str | None,
        typer.Option("--format", help="raw,qa,chat,prefix; none: those the model supports."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model's directory or hub id, for its tokenizer.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write figures and verdicts here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask a version about its edits, a benchmark set (--from) or general tasks (--tasks).

    Of its edits, those that the version's own job trained, unless --job or --all.
    """
    _check_options(source, tasks, job, all_edits)
    if (set_name != "auto" and source is None) or (include_path and tasks is None):
        raise InvalidInput("--set goes with --from, and --include-path with --tasks")
    if output is not None and not output.parent.is_dir():
        raise InvalidInput(f"--output {output}: {output.parent} is no directory; make it first")
    key = os.environ.get("ERRATA_API_KEY")
    url = os.environ.get("ERRATA_API_URL", "http://127.0.0.1:8000")
    with Client(url, key) as api:
        asked = [_version(api, name) for name in ([version, compare] if compare else [version])]
        if tasks is not None:
            harness = Harness(_listed(tasks), include_path)
            base = _model(api, model)
            rows = [r for v in asked for r in harness.measure(url, key, v["id"], base, limit)]
            report: JSON = {"tasks": _listed(tasks), "results": rows}
        else:
            if source is not None:
                subject = _of_set(source, set_name, limit)
            else:
                own = None if all_edits else job or asked[0]["job"]
                subject = _of_version(api, asked[0]["id"], own, limit)
            report = _interview(api, asked, subject, _renderings(api, formats, model), as_json)
    if output is not None:
        output.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    report.pop("verdicts", None)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(report)


@dataclass(frozen=True)
class Subject:
    """The edits that are asked about."""

    edits: Callable[[], Iterable[EditRecord]]
    total: int
    edited: Collection[str]
    """Prompts that the edits change, which no locality is measured on."""
    facts: JSON
    """What the report says of them."""


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def _check_options(source: str | None, tasks: str | None, job: str | None, all_edits: bool) -> None:
    asked = {"--from": source, "--tasks": tasks, "--job": job, "--all": all_edits or None}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise InvalidInput(f"{' and '.join(given)} exclude each other; give one of them")


def _version(api: Client, name: str | None) -> JSON:
    """The version of that name, or the committed one; `ApiError` if there is none."""
    wanted = api.get("/serving")["version"] if name is None else name
    return api.get(f"/versions/{'v0' if wanted == 'base' else wanted}", limit=1)


def _of_set(source: str, name: SetChoice, limit: int | None) -> Subject:
    found = BenchmarkSet(source, None if name == "auto" else name, limit)
    survey = found.survey
    facts = {
        "source": source,
        "records": survey.records,
        "conflicting": len(survey.conflicting),
        "superseded": survey.superseded,
    }
    return Subject(found.usable, survey.records - survey.superseded, survey.edited, facts)


def _of_version(api: Client, version: str, job: str | None, limit: int | None) -> Subject:
    found = api.pages("/edits", "edits", version=version, job=job)
    edits = [
        EditRecord.model_validate({name: item[name] for name in EditRecord.model_fields})
        for item in islice(found, limit)
    ]
    if not edits:
        trained = "" if job is None else f" that {job} trained"
        raise InvalidInput(
            f"{version} holds no edits{trained}; name another version, or a set with --from"
        )
    facts = {"version": version, "job": job}
    return Subject(lambda: edits, len(edits), edited_prompts(edits), facts)


def _renderings(api: Client, formats: str | None, model: str | None) -> Renderings:
    """How to put a prompt in each format; only formats other than raw need the model's files."""
    known = get_args(Format)
    names: list[Format] | None = None
    if formats is not None:
        unknown = [name for name in _listed(formats) if name not in known]
        if unknown:
            raise InvalidInput(f"--format: no {', '.join(unknown)}; there are {', '.join(known)}")
        names = [name for name in known if name in _listed(formats)]
        if names == ["raw"]:
            return RAW
    # Imported here: it takes seconds.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_model(api, model))
    return prompt_formats.renderings(prompt_formats.chosen(names, tokenizer), tokenizer)


def _model(api: Client, named: str | None) -> str:
    """The base model's directory or hub id; `InvalidInput` if it cannot be had here."""
    name: str = named or api.get("/v1/models")["data"][0]["root"]
    try:
        config = models.config_file(name)
    except UnsupportedModel as error:
        raise InvalidInput(
            f"{error}; name the base model's directory with --model, or ask --format raw only"
        ) from error
    return str(config.parent) if Path(name).expanduser().exists() else name


def _interview(
    api: Client,
    versions: Sequence[JSON],
    subject: Subject,
    renderings: Renderings,
    quiet: bool,
) -> JSON:
    started = time.monotonic()
    verdicts: dict[str, list[Verdict]] = {version["id"]: [] for version in versions}
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        bar = bars.add_task("", total=subject.total * len(versions))
        interviews = [
            Interview(
                api,
                version["id"],
                version["parent"] or "v0",
                renderings,
                lambda share: bars.advance(bar, share),
            )
            for version in versions
        ]
        for edits in _slices(subject.edits()):
            for version, interview in zip(verdicts, interviews, strict=True):
                verdicts[version] += interview.verdicts(edits, subject.edited)
    return {
        **subject.facts,
        "edits": subject.total,
        "results": [r for v, found in verdicts.items() for r in _rows(v, found, renderings)],
        "seconds": round(time.monotonic() - started, 3),
        "verdicts": {v: [each.model_dump() for each in found] for v, found in verdicts.items()},
    }


def _slices(edits: Iterable[EditRecord]) -> Iterator[Sequence[EditRecord]]:
    left = iter(edits)
    while found := tuple(islice(left, SLICE)):
        yield found


def _rows(version: str, verdicts: Sequence[Verdict], renderings: Renderings) -> Iterator[JSON]:
    """A row per format; locality prompts are asked as they are, so it stands in the first."""
    figures = aggregate(verdicts)
    for number, name in enumerate(renderings):
        suffix = f".{name}" if number else ""
        yield {
            "version": version,
            "format": name,
            "reliability": figures.get(f"reliability{suffix}"),
            "generalization": figures.get(f"generalization{suffix}"),
            "locality": None if number else figures.get("locality"),
        }


def _show(report: JSON) -> None:
    if "edits" in report:
        subject = report.get("source") or report["version"]
        console.print(f"{report['edits']} edits of {subject}, {report['seconds']:.1f} s")
    if report.get("conflicting"):
        console.print(
            f"{report['conflicting']} facts have several targets: the last one counts, "
            f"{report['superseded']} records are left out"
        )
    columns = tuple(report["results"][0])
    rows = [tuple(map(_figure, row.values())) for row in report["results"]]
    table(columns, rows)


def _figure(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
