"""What `errata locate` prints of its results. Knows the report only."""

from collections.abc import Mapping

from service.display import FIGURES, console, percent, table
from workers.location_choice import Figures, Outcome
from workers.location_report import LocationReport, place, said
from workers.locations import Location


def line(outcome: Outcome) -> str:
    """One trial, as soon as it is over."""
    where = f"{place(outcome)}, learning rate {outcome.trial.learning_rate:g}"
    if outcome.error is not None:
        return f"{where}: failed: {outcome.error}"
    seconds = outcome.seconds_train + outcome.seconds_evaluate
    return f"{where}: {said(outcome.figures)}; {outcome.epochs} epochs, {seconds:.1f} s"


def show(report: LocationReport, files: Mapping[str, str]) -> None:
    """Everything that was found, and where it was written."""
    scores = {scored.location: scored.score for scored in report.fisher or ()}
    columns = ("location", "weights", "rate", *FIGURES)
    rows = [
        ("unedited", "", "", *_percents(report.before)),
        *(_row(outcome, scores) for outcome in report.outcomes),
    ]
    console.print()
    table((*columns, "Fisher") if scores else columns, rows)
    for outcome in report.outcomes:
        if outcome.error is not None:
            console.print(line(outcome))
    _show_agreement(report)
    console.print(f"\nChosen: {place(report.chosen)}: {said(report.chosen.figures)}")
    console.print(f"Rule: {report.rule}")
    for kind, file in files.items():
        console.print(f"{kind}: {file}", soft_wrap=True)


def _row(outcome: Outcome, scores: Mapping[Location, float]) -> tuple[object, ...]:
    location = outcome.trial.location
    score = (f"{scores[location]:.3g}",) if scores else ()
    return (
        f"{location.layer} {location.module}",
        f"{location.weights / 1e6:.3g} M",
        f"{outcome.trial.learning_rate:g}",
        *_percents(outcome.figures),
        *score,
    )


def _percents(figures: Figures) -> list[str]:
    return [percent(getattr(figures, name)) for name in FIGURES]


def _show_agreement(report: LocationReport) -> None:
    if report.agreement is None:
        return
    console.print(
        "\nSpearman's rank correlation of the Fisher score, over the locations that were swept, "
        "with the ranking above and with each figure:"
    )
    rows = [
        (over, *("" if value is None else f"{value:+.2f}" for value in found.values()))
        for over, found in report.agreement.items()
    ]
    table(("over", "ranking", *FIGURES), rows)
    if report.left_out:
        names = ", ".join(f"{one.module} of layer {one.layer}" for one in report.left_out)
        console.print(f"left out by their scores: {names}")
