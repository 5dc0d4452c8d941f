"""`errata`: the command line. Every command but `up` is a client of the HTTP interface."""

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from service import display
from service.client import ApiError, Client, read_jsonl
from service.commands.check import check
from service.commands.evaluate import evaluate
from service.commands.locate import locate
from service.commands.plan import plan
from service.errors import ErrataError
from service.settings import problems
from workers.benchmark_sets import BenchmarkSet, SetName, to_edit_json
from workers.errors import WorkersError

app = typer.Typer(help="Edits what a language model knows.", no_args_is_help=True)
edits_app = typer.Typer(help="Submit and look at edits.", no_args_is_help=True)
jobs_app = typer.Typer(help="Run and watch batch-edit jobs.", no_args_is_help=True)
versions_app = typer.Typer(help="Look at versions, roll forward or back.", no_args_is_help=True)
app.add_typer(edits_app, name="edits")
app.add_typer(jobs_app, name="jobs")
app.add_typer(versions_app, name="versions")
app.command("check")(check)
app.command("eval")(evaluate)
app.command("locate")(locate)
app.command("plan")(plan)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Limit = Annotated[int, typer.Option(min=1, help="How many at most.")]


@contextmanager
def client() -> Iterator[Client]:
    """A client for `ERRATA_API_URL`."""
    url = os.environ.get("ERRATA_API_URL", "http://127.0.0.1:8000")
    with Client(url, os.environ.get("ERRATA_API_KEY")) as connected:
        yield connected


def show(value: Any, as_json: bool, render: Any) -> None:
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
    else:
        render(value)


def first(items: Iterable[Any], limit: int) -> list[Any]:
    return [item for item, _ in zip(items, range(limit), strict=False)]


@app.command()
def up(
    model: Annotated[str | None, typer.Option(help="demo, a directory or a hub id.")] = None,
    host: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option()] = None,
    replicas: Annotated[int | None, typer.Option(help="Inference replicas.")] = None,
    train_workers: Annotated[int | None, typer.Option(help="Training ranks.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where everything is kept.")] = None,
    as_json: AsJson = False,
) -> None:
    """Start the service on this machine, in the foreground; Ctrl-C ends all it started."""
    from service import node
    from service.settings import Settings

    given = {
        "model": model,
        "host": host,
        "port": port,
        "replicas": replicas,
        "train_workers": train_workers,
        "data_dir": data_dir,
    }
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger(node.__name__).setLevel(logging.INFO)
    changes = {name: value for name, value in given.items() if value is not None}
    node.run(Settings().replace(**changes), lambda url: show({"url": url}, as_json, display.ready))


@edits_app.command("submit")
def submit_edits(
    file: str,
    set_name: Annotated[
        SetName | None, typer.Option("--set", help="The file or hub id is such a benchmark set.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of a benchmark set: so many.")] = None,
    as_json: AsJson = False,
) -> None:
    """Submit the edits of a file with one JSON object a line, or of a benchmark set."""
    if set_name is None:
        edits = read_jsonl(Path(file))
    else:
        edits = [to_edit_json(edit) for edit in BenchmarkSet(file, set_name, limit).usable()]
    with client() as api:
        show(api.submit(edits), as_json, display.submitted)


@edits_app.command("list")
def list_edits(
    state: str | None = None,
    version: str | None = None,
    job: str | None = None,
    q: Annotated[str | None, typer.Option(help="Text in the prompt or the target.")] = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List edits, newest first."""
    with client() as api:
        pages = api.pages("/edits", "edits", state=state, version=version, job=job, q=q)
        show(first(pages, limit), as_json, display.edits)


@edits_app.command("show")
def show_edit(edit_id: str, as_json: AsJson = False) -> None:
    """Show one edit with its history."""
    with client() as api:
        show(api.get(f"/edits/{edit_id}"), as_json, display.edit)


@jobs_app.command("run")
def run_job(
    kind: Annotated[str, typer.Option(help="extend or rebuild.")] = "extend",
    max_edits: Annotated[int | None, typer.Option(min=1)] = None,
    activate: Annotated[bool, typer.Option(help="Roll the version out.")] = True,
    recheck: Annotated[
        str | None, typer.Option(help="How many earlier edits to ask again: a number, or all.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch it to its end.")] = False,
    here: Annotated[
        bool,
        typer.Option(
            "--here",
            help="Train it on the Ray cluster where this runs (RAY_ADDRESS; none: one of its own) "
            "and leave the rest to the service; returns once trained, unless --wait. "
            "First, a job that such a command left unfinished is gone on with instead.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start a batch-edit job over the queued edits."""
    body: dict[str, Any] = {"kind": kind, "activate": activate}
    if max_edits is not None:
        body["max_edits"] = max_edits
    if recheck is not None:
        body["recheck"] = int(recheck) if recheck.isdecimal() else recheck
    if here:
        from service.commands.here import run_here

        conclude(run_here(body, wait, quiet=as_json), as_json, wait=wait)
        return
    with client() as api:
        job = api.post("/jobs", body)
        if not wait:
            show(job, as_json, display.job)
            return
        finish(api, job["id"], as_json)


@jobs_app.command("list")
def list_jobs(limit: Limit = 20, as_json: AsJson = False) -> None:
    """List jobs, newest first."""
    with client() as api:
        show(first(api.pages("/jobs", "jobs"), limit), as_json, display.jobs)


@jobs_app.command("show")
def show_job(job_id: str, as_json: AsJson = False) -> None:
    """Show one job."""
    with client() as api:
        show(api.get(f"/jobs/{job_id}"), as_json, display.job)


@jobs_app.command("watch")
def watch_job(job_id: str, as_json: AsJson = False) -> None:
    """Watch a job to its end; exits with 1 if it did not succeed."""
    with client() as api:
        finish(api, job_id, as_json)


def finish(api: Client, job_id: str, as_json: bool) -> None:
    conclude(display.watch(api, job_id, quiet=as_json), as_json)


def conclude(job: dict[str, Any], as_json: bool, *, wait: bool = True) -> None:
    """Success is that it is done or, of one that is not waited for, that it has not failed."""
    state = job["state"]
    show(job, as_json, display.job)
    if state == "failed" or (wait and state != "done"):
        raise typer.Exit(1)


@versions_app.command("list")
def list_versions(limit: Limit = 50, as_json: AsJson = False) -> None:
    """List versions, newest first."""
    with client() as api:
        show(first(api.pages("/versions", "versions"), limit), as_json, display.versions)


@versions_app.command("show")
def show_version(version_id: str, as_json: AsJson = False) -> None:
    """Show one version."""
    with client() as api:
        show(api.get(f"/versions/{version_id}"), as_json, display.version)


@versions_app.command("activate")
def activate_version(
    version_id: str,
    percent: Annotated[
        float, typer.Option(help="Of the queries; below 100: serve it as a canary.")
    ] = 100.0,
    promote_after: Annotated[
        float | None, typer.Option(help="Seconds after which a canary that is sound gets all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a version: roll forward or back. Returns once it is committed.

    Activating the live version rolls a canary back.
    """
    body: dict[str, Any] = {"percent": percent}
    if promote_after is not None:
        body["promote_after_s"] = promote_after
    with client() as api:
        api.post(f"/versions/{version_id}/activate", body)
        show(display.await_rollout(api, version_id), as_json, display.serving)


@app.command()
def ask(
    prompt: str,
    version: Annotated[str | None, typer.Option(help="v12; none: the committed one.")] = None,
    compare: Annotated[str | None, typer.Option(help="Ask this version too.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 32,
    as_json: AsJson = False,
) -> None:
    """Ask the model, greedily."""
    asked = [version, compare] if compare else [version]
    with client() as api:
        models = [f"errata@{name}" if name else "errata" for name in asked]
        texts = [api.ask(prompt, model=model, max_tokens=max_tokens) for model in models]
    answers = [{"version": served, "answer": text} for text, served in texts]
    show({"prompt": prompt, "answers": answers}, as_json, display.answers)


def main() -> None:
    """Runs the command line; every expected failure is one clear message and exit code 1."""
    try:
        app()
    except ValidationError as error:
        fail(problems(error))
    except (ApiError, ErrataError, WorkersError, ValueError, OSError) as error:
        fail(str(error))


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
