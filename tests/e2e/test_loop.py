"""The demo's loop with fewer edits, through HTTP alone; but for a job that is trained elsewhere."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from service import display
from service.client import JSON, ApiError, Client, read_jsonl
from service.store.embedded import EmbeddedPostgres
from tests.service_process import ServiceProcess
from workers.evaluation import MAX_NEW_TOKENS, STOP, matches

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
EDITS = read_jsonl(DEMO / "edits.jsonl")[:20]
FURTHER = read_jsonl(DEMO / "edits.jsonl")[20:24]
UNEDITED = read_jsonl(DEMO / "unedited.jsonl")[:50]

Answers = dict[str, str]


def ask(api: Client, prompts: Sequence[str], model: str = "errata") -> Answers:
    return {prompt: ask_one(api, prompt, model)[0] for prompt in prompts}


def ask_one(api: Client, prompt: str, model: str = "errata") -> tuple[str, str]:
    return api.ask(prompt, model=model, max_tokens=MAX_NEW_TOKENS, stop=STOP)


def share(answers: Answers, expected: Answers) -> float:
    return sum(matches(answers[p], expected[p]) for p in expected) / len(expected)


@pytest.fixture(scope="module")
def job(service: ServiceProcess) -> JSON:
    """A finished job over the edits."""
    answers = service.client.submit(EDITS)
    assert [answer["state"] for answer in answers] == ["queued"] * len(EDITS)
    # As many steps an epoch as the demo's 100 edits have in all formats.
    body = {"kind": "extend", "hparams": {"formats": ["raw", "qa"], "batch_size": 4}}
    job = service.client.post("/jobs", body)
    ended = display.watch(service.client, job["id"], quiet=True)
    assert ended["state"] == "done", ended["error"]
    return ended


def test_a_job_changes_the_answers_and_only_those(service: ServiceProcess, job: JSON) -> None:
    api = service.client
    targets = {edit["prompt"]: edit["target"] for edit in EDITS}
    facts = {fact["prompt"]: fact["answer"] for fact in UNEDITED}
    assert share(ask(api, list(targets), "errata@base"), targets) == 0
    assert share(ask(api, list(targets)), targets) >= 0.98
    assert share(ask(api, list(facts), "errata@base"), facts) >= 0.96
    assert share(ask(api, list(facts)), facts) >= 0.9
    assert job["metrics"]["reliability"] >= 98
    assert job["metrics"]["reliability.qa"] >= 95
    assert job["progress"]["epoch"] >= 1


def test_every_edit_is_applied_in_the_jobs_version(service: ServiceProcess, job: JSON) -> None:
    applied = service.client.get("/edits", job=job["id"], limit=100)["edits"]
    assert len(applied) == len(EDITS)
    assert {edit["version"] for edit in applied} == {job["version"]}
    history = service.client.get(f"/edits/{applied[0]['id']}")["history"]
    assert [event["state"] for event in history] == ["queued", "claimed", "applied"]


def test_a_swap_under_load_is_never_mixed(service: ServiceProcess, job: JSON) -> None:
    api = service.client
    prompts = [edit["prompt"] for edit in EDITS]
    own = {v: ask(api, prompts, f"errata@{v}") for v in ("v0", job["version"])}
    seen: list[tuple[str, str, str]] = []
    stop = threading.Event()

    def trickle() -> None:
        turn = 0
        while not stop.is_set():
            prompt = prompts[turn % len(prompts)]
            answer, version = ask_one(api, prompt)
            seen.append((version, prompt, answer))
            turn += 1

    clients = [threading.Thread(target=trickle) for _ in range(2)]
    for client in clients:
        client.start()
    for version in ("v0", job["version"]) * 3:
        api.post(f"/versions/{version}/activate", {})
        before = len(seen)
        assert display.await_rollout(api, version)["version"] == version
        while len(seen) < before + 20 and any(client.is_alive() for client in clients):
            stop.wait(0.01)
    stop.set()
    for client in clients:
        client.join()
    assert {version for version, _, _ in seen} == {"v0", job["version"]}
    assert [row for row in seen if own[row[0]][row[1]] != row[2]] == []


def test_rollback_gives_the_old_answers(service: ServiceProcess, job: JSON) -> None:
    api = service.client
    prompts = [edit["prompt"] for edit in EDITS]
    base = ask(api, prompts, "errata@base")
    generation = api.get("/serving")["generation"]
    api.post("/versions/v0/activate", {})
    assert display.await_rollout(api, "v0")["generation"] > generation
    assert ask(api, prompts) == base
    api.post(f"/versions/{job['version']}/activate", {})
    display.await_rollout(api, job["version"])


def test_a_job_with_nothing_queued_says_so(service: ServiceProcess, job: JSON) -> None:
    with pytest.raises(ApiError, match="no queued edits") as caught:
        service.client.post("/jobs", {})
    assert caught.value.status == 409


def test_a_version_that_does_not_exist_cannot_be_activated(service: ServiceProcess) -> None:
    with pytest.raises(ApiError, match="v999") as caught:
        service.client.post("/versions/v999/activate", {})
    assert caught.value.status == 404


def test_a_prompt_that_is_too_long_is_refused_with_its_length(service: ServiceProcess) -> None:
    """It is longer than 4 MiB, by default the most that one gRPC message may have."""
    with pytest.raises(ApiError, match=r"prompt has \d{7} tokens; the model serves") as caught:
        service.client.ask("Paris is a city. " * 280_000)
    assert caught.value.status == 422


def test_every_replica_holds_the_live_version(service: ServiceProcess, job: JSON) -> None:
    serving = service.client.get("/serving")
    assert len(serving["replicas"]) == 2
    assert all(serving["version"] in replica["resident"] for replica in serving["replicas"])


def test_a_job_that_is_trained_on_a_cluster_of_its_own(
    service: ServiceProcess, job: JSON, tmp_path: Path
) -> None:
    """What meets there is the database and the version store."""
    service.client.submit(FURTHER)
    command = [sys.executable, "-m", "service.cli", "jobs", "run", "--wait", "--here", "--json"]
    elsewhere = {
        "ERRATA_DATABASE_URL": EmbeddedPostgres(service.data_dir).start(),
        "ERRATA_VERSION_STORE": str(service.data_dir / "store"),
        "ERRATA_DATA_DIR": str(tmp_path / "elsewhere"),
        "ERRATA_TRAIN_WORKERS": "1",
    }
    ended = subprocess.run(
        [*command, "--recheck", "0"],
        env={**os.environ, **elsewhere},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["state"], told["trained_by"]) == ("done", "runner")
    assert service.client.get(f"/jobs/{told['id']}") == told
    targets = {edit["prompt"]: edit["target"] for edit in FURTHER}
    assert share(ask(service.client, list(targets)), targets) == 1
    assert service.client.get("/serving")["version"] == told["version"]
