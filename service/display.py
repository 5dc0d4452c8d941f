"""What the command line shows. Knows only the shapes of the HTTP answers."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.client import JSON, ApiError, Client

console = Console(highlight=False)

FIRST = "first"
"""The prompt format that decides whether an edit is applied: raw, unless the job says otherwise."""
FIGURES = ("reliability", "generalization", "locality")
ENDED = ("done", "failed", "cancelled")
POLL_S = 0.5


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    shown = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        shown.add_row(*("" if cell is None else str(cell) for cell in row))
    console.print(shown)


def pairs(values: JSON) -> None:
    given = [(name, value) for name, value in values.items() if value not in (None, {}, [], "")]
    table(("", ""), given)


def ready(value: JSON) -> None:
    console.print(f"Errata is ready at {value['url']} (API: {value['url']}/docs). Ctrl-C ends it.")


def findings(found: list[JSON]) -> None:
    for one in found:
        mark = "[green]ok[/]  " if one["passed"] else "[red]FAIL[/]"
        console.print(f"{mark} {one['about']}: {escape(one['detail'])}")


def submitted(answers: list[JSON]) -> None:
    replaced = sum("supersedes" in answer for answer in answers)
    console.print(f"{len(answers)} edits queued; {replaced} of them replace earlier ones")


def edits(items: list[JSON]) -> None:
    rows = [(e["id"], e["state"], e["version"], e["prompt"], e["target"]) for e in items]
    table(("id", "state", "version", "prompt", "target"), rows)


def edit(item: JSON) -> None:
    history, verdict = item.pop("history"), item.pop("verdict", None)
    pairs(item)
    rows = [(h["at"], h["state"], h["job"], h["version"], h["detail"]) for h in history]
    table(("at", "state", "job", "version", "detail"), rows)
    if verdict:
        console.print(f"In {verdict['version']}:", style="bold")
        found = {FIRST: verdict, **verdict["formats"]}
        shown = [
            (name, yes(one["reliable"]), one["generalization"], one["answer"])
            for name, one in found.items()
        ]
        table(("format", "reliable", "generalization", "answer"), shown)


def jobs(items: list[JSON]) -> None:
    rows = [(j["id"], j["kind"], j["state"], j["edits"], j["version"], j["error"]) for j in items]
    table(("id", "kind", "state", "edits", "version", "error"), rows)


def job(item: JSON) -> None:
    found = item.pop("metrics")
    shown = {"progress": reached(item["progress"]), "seconds": figures(item["seconds"])}
    pairs({**item, **shown})
    metrics(found)


def versions(items: list[JSON]) -> None:
    rows = [
        (v["id"], v["state"], v["parent"], v["edits"], overall(v["metrics"]), v["created_at"])
        for v in items
    ]
    table(("id", "state", "parent", "edits", "metrics", "created"), rows)


def version(item: JSON) -> None:
    verdicts, found = item.pop("verdicts", []), item.pop("metrics")
    pairs(item)
    metrics(found)
    others = list(dict.fromkeys(name for v in verdicts for name in v["formats"]))
    rows = [
        (v["edit"], yes(v["reliable"]), v["answer"], *(in_format(v, name) for name in others))
        for v in verdicts
    ]
    if rows:
        table(("edit", "reliable", "answer", *others), rows)


def metrics(values: JSON) -> None:
    """A row for each prompt format; the first is the one that decides."""
    names = [name for name in FIGURES if name in values]
    formats = dict.fromkeys(name.partition(".")[2] for name in values if "." in name)
    rows = [(FIRST, *(percent(values.get(name)) for name in names))]
    for label in formats:
        rows.append((label, *(percent(values.get(f"{name}.{label}")) for name in names)))
    if names:
        table(("format", *names), rows)
    if "earlier" in values:
        asked = f"{values['earlier_asked']:.0f} earlier edits asked again"
        console.print(f"{percent(values['earlier'])} % of {asked} still hold")


def overall(values: JSON) -> str:
    """The figures without those of further formats."""
    return figures({name: value for name, value in values.items() if "." not in name})


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def yes(reliable: bool) -> str:
    return "yes" if reliable else "no"


def in_format(verdict: JSON, name: str) -> str:
    found = verdict["formats"].get(name)
    return "" if found is None else yes(found["reliable"])


def serving(item: JSON) -> None:
    console.print(f"{item['version']} is live (generation {item['generation']})")
    if item["canary"]:
        console.print("{version} answers {percent:g} % of the queries".format(**item["canary"]))


def answers(item: JSON) -> None:
    console.print(item["prompt"], style="bold")
    table(("", ""), [(a["version"], a["answer"].strip()) for a in item["answers"]])


def figures(values: JSON) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def watch(api: Client, job_id: str, *, quiet: bool = False) -> JSON:
    """Follows a job until it ends, showing how it goes."""
    with watching(quiet=quiet) as show:
        while (item := api.get(f"/jobs/{job_id}"))["state"] not in ENDED:
            show(item)
            time.sleep(POLL_S)
    return item


@contextmanager
def watching(*, quiet: bool = False) -> Iterator[Callable[[JSON], None]]:
    """Shows a job each time it is given: a bar on a terminal, a line a change otherwise."""
    shown = None
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        bar = bars.add_task("pending", total=1.0)

        def show(item: JSON) -> None:
            nonlocal shown
            progress = item["progress"] or {"epoch": 0, "max_epochs": 1}
            bars.update(
                bar, description=status(item), completed=progress["epoch"] / progress["max_epochs"]
            )
            stage = (item["state"], progress["epoch"])
            if stage != shown and not quiet and not console.is_terminal:
                console.print(status(item))
            shown = stage

        yield show


def status(item: JSON) -> str:
    if item["state"] != "training" or not item["progress"]:
        return str(item["state"])
    return f"training: {reached(item['progress'])}"


def reached(progress: JSON | None) -> str:
    if progress is None:
        return ""
    epochs = f"epoch {progress['epoch']} of at most {progress['max_epochs']}"
    left = f"at most {progress['seconds_left']:.0f} s left"
    return f"{epochs}, loss {progress['loss']:.3f}, {left}"


def await_rollout(api: Client, version_id: str, timeout_s: float = 120.0) -> JSON:
    """Waits until `version_id` is committed, live or as the canary.

    Raises `ApiError` if it is not going to be.
    """
    deadline = time.monotonic() + timeout_s
    while (item := api.get("/serving"))["staging"] is not None or version_id not in served(item):
        if item["staging"] != version_id:
            error = api.get(f"/versions/{version_id}")["error"]
            raise ApiError(None, f"{version_id} was not activated: {error or 'given up'}")
        if time.monotonic() > deadline:
            raise ApiError(None, f"{version_id} is still being staged after {timeout_s:g} s")
        time.sleep(0.05)
    return item


def served(item: JSON) -> set[str]:
    """The versions that answer queries which name none."""
    return {item["version"], *([item["canary"]["version"]] if item["canary"] else [])}
