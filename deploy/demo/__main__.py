"""`make demo`: real facts change inside a running model, through REST, and change back.

Starts the service as a user would (`errata up`), then only talks HTTP to it.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service import display
from service.client import ApiError, Client, read_jsonl
from workers.evaluation import MAX_NEW_TOKENS, STOP, matches

HERE = Path(__file__).parent
DATA_DIR = Path(".errata")
SHOWN = 6
CLIENTS = 16

Row = dict[str, Any]


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the service running")
    keep = parser.parse_args().keep
    watch = Stopwatch()
    began = time.monotonic()
    with watch.stage("start"):
        service, url = start()
    try:
        with Client(url) as api:
            result = show_edits(api, watch)
        watch.seconds["all"] = round(time.monotonic() - began, 2)
        (DATA_DIR / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
        report(result)
    except BaseException:
        end(service)
        raise
    if keep:
        how_to_use(service, url)
    else:
        end(service)


def start() -> tuple[subprocess.Popen[str], str]:
    """Starts `errata up` and waits for its URL."""
    display.console.print("[bold]Starting the service[/] (PostgreSQL, Ray, two replicas)")
    DATA_DIR.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "service.cli", "up", "--json", "--data-dir", str(DATA_DIR)]
    with (DATA_DIR / "demo.log").open("w") as log:
        service = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    assert service.stdout is not None
    line = service.stdout.readline()
    if not line:
        service.wait()
        raise SystemExit(f"the service did not start:\n{(DATA_DIR / 'demo.log').read_text()}")
    return service, json.loads(line)["url"]


def end(service: subprocess.Popen[str]) -> None:
    service.send_signal(signal.SIGINT)
    service.wait()


def show_edits(api: Client, watch: Stopwatch) -> Row:
    """The demo itself: ask, edit, ask again, roll back; returns its figures."""
    edits, unedited = read_jsonl(HERE / "edits.jsonl"), read_jsonl(HERE / "unedited.jsonl")
    activate(api, "v0")
    prompts = [edit["prompt"] for edit in edits]
    rephrases = [(edit, prompt) for edit in edits for prompt in edit["rephrases"]]

    display.console.print(f"[bold]Asking {len(prompts)} CounterFact prompts[/]")
    with watch.stage("ask_before"):
        before = ask_all(api, prompts)
        kept_before = ask_all(api, [fact["prompt"] for fact in unedited])
    display.console.print(f"[bold]Posting {len(edits)} edits and training them[/]")
    with watch.stage("submit"):
        api.submit(edits)
    with watch.stage("job"):
        job = display.watch(api, api.post("/jobs", {"kind": "extend"})["id"])
    if job["state"] != "done":
        raise SystemExit(f"the job {job['state']}: {job['error']}")
    watch.seconds |= {f"job_{name}": round(value, 2) for name, value in job["seconds"].items()}
    display.console.print(f"[bold]Asking {job['version']}, now live[/]")
    with watch.stage("ask_after"):
        after = ask_all(api, prompts)
        general = ask_all(api, [prompt for _, prompt in rephrases])
        kept_after = ask_all(api, [fact["prompt"] for fact in unedited])
    display.table(
        ("prompt", "before", "after", "wanted"),
        list(zip(prompts, before, after, (edit["target"] for edit in edits), strict=True))[:SHOWN],
    )
    facts = [fact["answer"] for fact in unedited]
    targets = [edit["target"] for edit in edits]
    result: Row = {
        "edits": len(edits),
        "reliability": percent(after, targets),
        "generalization": percent(general, [edit["target"] for edit, _ in rephrases]),
        "locality_before": percent(kept_before, facts),
        "locality_after": percent(kept_after, facts),
        "formats": job["metrics"],
        "seconds": watch.seconds,
    }
    roll_back(api, watch, prompts[0])
    return result


def ask_all(api: Client, prompts: Sequence[str]) -> list[str]:
    def ask(prompt: str) -> str:
        return api.ask(prompt, max_tokens=MAX_NEW_TOKENS, stop=STOP)[0].strip()

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(ask, prompts))


def percent(answers: Sequence[str], expected: Sequence[str]) -> float:
    right = sum(map(matches, answers, expected))
    return round(100 * right / len(expected), 1)


def report(result: Row) -> None:
    percents = ("reliability", "generalization", "locality_before", "locality_after")
    display.table(("\nfigure", "\n%"), [(name, result[name]) for name in percents])
    display.console.print("\nThe job's own evaluation, by prompt format:")
    display.metrics(result["formats"])
    display.table(("\nstage", "\nseconds"), list(result["seconds"].items()))


def roll_back(api: Client, watch: Stopwatch, prompt: str) -> None:
    with watch.stage("rollback"):
        activate(api, "v0")
    answer, version = api.ask(prompt, max_tokens=MAX_NEW_TOKENS, stop=STOP)
    display.console.print(f"\n[bold]Rolled back to {version}:[/] {prompt}[bold]{answer}[/]")


def activate(api: Client, version: str) -> None:
    api.post(f"/versions/{version}/activate", {})
    display.await_rollout(api, version)


def how_to_use(service: subprocess.Popen[str], url: str) -> None:
    errata = Path(sys.executable).parent / "errata"
    with Client(url) as api:
        newest = api.get("/versions", limit=1)["versions"][0]["id"]
    prompt = shlex.quote(read_jsonl(HERE / "edits.jsonl")[0]["prompt"])
    lines = (
        f"\nThe service runs on at {url} (pages at {url}/docs).",
        f"  export ERRATA_API_URL={url}",
        f"  {errata} ask {prompt} --compare {newest}",
        f"  {errata} versions list",
        f"  {errata} versions activate {newest}",
        f"  kill -INT {service.pid}   # ends it and all it started",
    )
    display.console.print("\n".join(lines), soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except ApiError as error:
        raise SystemExit(f"error: {error}") from error
