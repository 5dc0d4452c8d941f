"""`errata locate`: which module of which layer to tune. Needs no service; runs in this process.

Owns the options and the progress; `workers.locate` does the work.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from service import location_tables
from service.display import console
from service.errors import InvalidInput
from workers import edit_source, location_report, presets
from workers.contract import EditRecord, Hparams
from workers.errors import TrainingFailed
from workers.location_choice import (
    MARGIN,
    RULE,
    Figures,
    Outcome,
    Trial,
    agreement,
    most_promising,
    ranking,
)
from workers.location_log import LocationLog
from workers.location_report import LocationReport, Scored
from workers.locations import MODULES, Location, layers_of, locations, modules_of
from workers.models import ModelFacts, check, resolve
from workers.plan_parameters import shapes

if TYPE_CHECKING:
    from workers.locate import Search
    from workers.locft import State

_SWEEP = "Sweep"
_TRAINING = "Training (the defaults are the model's own hyperparameters)"


def locate(
    model: Annotated[str, typer.Argument(help="A directory or a hub id.")],
    source: Annotated[
        str, typer.Option("--from", help="Edits (.jsonl), or a benchmark set: a file or a hub id.")
    ],
    unrelated: Annotated[
        Path | None,
        typer.Option(help="A .jsonl file of prompts whose answers are to stay: locality too."),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="How many edits, drawn by the seed.")] = 50,
    output: Annotated[
        Path | None, typer.Option(help="A directory for the results; none: locate-MODEL, here.")
    ] = None,
    modules: Annotated[
        str, typer.Option(help=f"Of {','.join(MODULES)}.", rich_help_panel=_SWEEP)
    ] = ",".join(MODULES),
    layers: Annotated[str, typer.Option(help="all, or as 0-5,7.", rich_help_panel=_SWEEP)] = "all",
    prune: Annotated[
        str,
        typer.Option(
            help="Score the layers first (diagonal Fisher), and of each kind of module sweep this "
            "fraction of them only, best first; 1: score all, sweep all; none: no scores.",
            rich_help_panel=_SWEEP,
        ),
    ] = "none",
    margin: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="How many points of reliability may be given up for locality.",
            rich_help_panel=_SWEEP,
        ),
    ] = MARGIN,
    learning_rate: Annotated[
        list[float] | None,
        typer.Option(help="Repeatable: each location at each.", rich_help_panel=_TRAINING),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="At most.", rich_help_panel=_TRAINING)] = None,
    batch_size: Annotated[int | None, typer.Option(rich_help_panel=_TRAINING)] = None,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=_TRAINING)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search for the layer and module that take edits best; write hyperparameters for it.

    Trains each location on a sample of edits and asks for reliability, generalization and
    locality. Of the locations about as reliable as the best one, that which keeps unrelated
    answers best is chosen. Interrupted, it goes on if started again with the same --output.
    """
    fraction = _fraction(prune)
    facts = check(resolve(model))
    searched = layers_of(layers, facts.num_hidden_layers)
    found, skipped = locations(shapes(facts), searched, modules_of(modules))
    if not found:
        raise InvalidInput(f"--modules {modules}: {'; '.join(skipped)}")
    hparams, rates = _hparams(facts, learning_rate, epochs, batch_size, seed)
    task = Task(model, facts, source, _sample(source, unrelated, sample, seed), hparams, rates)
    folder = output or Path(f"locate-{facts.path.name}")
    if not as_json:
        _introduce(task, found, skipped)
    began = time.monotonic()
    result = _search(task, found, fraction, folder, quiet=as_json)
    report = _report(task, found, skipped, result, margin, time.monotonic() - began)
    files = location_report.write(report, facts, folder)
    if as_json:
        print(json.dumps({**report.model_dump(mode="json"), "files": files}, ensure_ascii=False))
    else:
        location_tables.show(report, files)


@dataclass(frozen=True)
class Task:
    """What every location is tried on, and how."""

    model: str
    """As it was named."""
    facts: ModelFacts
    source: str
    edits: Sequence[EditRecord]
    hparams: Hparams
    rates: Sequence[float]


def _fraction(prune: str) -> float | None:
    if prune == "none":
        return None
    try:
        fraction = float(prune)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise InvalidInput(f"--prune {prune}: give none, or a fraction above 0 and at most 1")
    return fraction


def _hparams(
    facts: ModelFacts,
    learning_rates: list[float] | None,
    epochs: int | None,
    batch_size: int | None,
    seed: int,
) -> tuple[Hparams, list[float]]:
    """The hyperparameters of every location, and the learning rates that each is tried at."""
    given = {"max_epochs": epochs, "batch_size": batch_size, "seed": seed}
    hparams = presets.load(facts, None, {n: v for n, v in given.items() if v is not None})
    rates = list(dict.fromkeys(learning_rates or [hparams.learning_rate]))
    for rate in rates:
        if not 0 < rate <= 1:
            raise InvalidInput(f"--learning-rate {rate:g}: give one above 0 and at most 1")
    return hparams, rates


def _sample(source: str, unrelated: Path | None, count: int, seed: int) -> list[EditRecord]:
    edits = edit_source.sample(edit_source.read_edits(source), count, seed)
    probes = [] if unrelated is None else edit_source.read_probes(unrelated)
    return edit_source.with_unrelated(edits, probes)


def _introduce(task: Task, found: Sequence[Location], skipped: Sequence[str]) -> None:
    rephrases, probes = _asked(task.edits)
    rates = " and ".join(f"{rate:g}" for rate in task.rates)
    console.print(
        f"{len(found)} locations of {task.facts.architecture} in {task.facts.path.name}, each on "
        f"{len(task.edits)} edits of {Path(task.source).name} with {rephrases} rephrases and "
        f"{probes} unrelated prompts; learning rate {rates}, batches of {task.hparams.batch_size}, "
        f"at most {task.hparams.max_epochs} epochs, {task.hparams.dtype}"
    )
    if not rephrases:
        console.print("no edit has rephrases, so generalization is blank")
    if not probes:
        console.print(
            "no edit has locality prompts, so locality is blank and the choice cannot put it "
            "first; give some with --unrelated"
        )
    for line in skipped:
        console.print(line)


def _asked(edits: Sequence[EditRecord]) -> tuple[int, int]:
    """How many rephrases and locality prompts there are."""
    return sum(len(e.rephrases) for e in edits), sum(len(e.locality) for e in edits)


@dataclass(frozen=True)
class Result:
    """What a search found."""

    before: Figures
    scores: Mapping[Location, float] | None
    outcomes: Sequence[Outcome]


def _search(
    task: Task, found: Sequence[Location], fraction: float | None, folder: Path, *, quiet: bool
) -> Result:
    # Imported here: torch takes seconds, and a wrong option is told before.
    from workers.locate import Search, settings

    log = LocationLog(folder, settings(task.facts, task.hparams, task.edits))
    with closing(Search(task.facts, task.hparams, task.edits, folder)) as search:
        before = search.before()
        scores = None if fraction is None else _scores(search, found, quiet)
        kept = found if scores is None else most_promising(scores, fraction or 1.0)
        trials = [Trial(location=one, learning_rate=rate) for one in kept for rate in task.rates]
        _sweep(search, trials, log, quiet)
    return Result(before, scores, [log.outcomes[trial] for trial in trials])


def _report(
    task: Task,
    found: Sequence[Location],
    skipped: Sequence[str],
    result: Result,
    margin: float,
    seconds: float,
) -> LocationReport:
    """Raises `TrainingFailed` if no location could be trained."""
    scores, outcomes = result.scores, result.outcomes
    ranked = ranking(outcomes, margin)
    if not ranked:
        raise TrainingFailed(f"no location could be trained; the first: {outcomes[0].error}")
    tried = {outcome.trial.location for outcome in outcomes}
    rephrases, probes = _asked(task.edits)
    return LocationReport(
        model=task.model,
        architecture=task.facts.architecture,
        source=task.source,
        edits=len(task.edits),
        rephrases=rephrases,
        locality_prompts=probes,
        training=location_report.training_of(task.hparams),
        rule=RULE.format(margin=margin),
        margin=margin,
        skipped=tuple(skipped),
        before=result.before,
        outcomes=(*ranked, *(outcome for outcome in outcomes if outcome.error is not None)),
        chosen=ranked[0],
        fisher=None if scores is None else _ordered(scores),
        left_out=tuple(one for one in found if one not in tried),
        agreement=None if scores is None else agreement(scores, outcomes, margin),
        seconds=seconds,
    )


def _ordered(scores: Mapping[Location, float]) -> tuple[Scored, ...]:
    first = sorted(scores, key=lambda location: -scores[location])
    return tuple(Scored(location=location, score=scores[location]) for location in first)


def _scores(search: "Search", found: Sequence[Location], quiet: bool) -> dict[Location, float]:
    layers = len({location.layer for location in found})
    with _bar("Fisher scores", layers, quiet) as (bars, bar):
        return search.fisher(found, lambda _: bars.advance(bar))


def _sweep(search: "Search", trials: Sequence[Trial], log: LocationLog, quiet: bool) -> None:
    todo = [trial for trial in trials if trial not in log.outcomes]
    plain = not quiet and not console.is_terminal
    if plain and len(todo) < len(trials):
        console.print(f"{len(trials) - len(todo)} of {len(trials)} trials were done before")
    with _bar("", len(trials), quiet) as (bars, bar):
        bars.advance(bar, len(trials) - len(todo))

        def watch(trial: Trial, state: "State") -> None:
            where = f"layer {trial.location.layer}, {trial.location.module}"
            epoch = f"epoch {state.epoch}, loss {state.loss:.3f}"
            bars.update(bar, description=f"{where}: {epoch}")

        for outcome in search.outcomes(todo, watch):
            log.add(outcome)
            bars.advance(bar)
            if plain:
                console.print(location_tables.line(outcome))


@contextmanager
def _bar(description: str, total: int, quiet: bool) -> Iterator[tuple[Progress, TaskID]]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}")
    with Progress(*columns, text, console=console, disable=quiet or not console.is_terminal) as on:
        yield on, on.add_task(description, total=total)
