"""A Job starts a copy of the suspended RayJob, waits for it, and says how it ended."""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deploy import rayjob
from tests.manifests.kubernetes_api import JSON, Cluster, running
from tests.manifests.rendering import Manifests

RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
Start = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A Kubernetes API, and the environment of a pod there; nothing is waited for long."""
    monkeypatch.setattr(rayjob, "POLL_S", 0.01)
    monkeypatch.setattr(rayjob, "AWAY_S", 0.3)
    monkeypatch.setattr(rayjob, "UNSEEN_S", 0.3)
    with running(tmp_path / "account") as cluster:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(cluster.port))
        yield cluster


@pytest.fixture
def start(cluster: Cluster, dev: Manifests, capsys: pytest.CaptureFixture[str]) -> Start:
    """Runs the command; gives its exit code, output and errors."""
    cluster.jobs["errata-train"] = copy.deepcopy(dev.one("RayJob", "errata-train"))

    def run(*more: str, uid: str = "uid-1") -> tuple[int, str, str]:
        given = ["errata-train", "--name=nightly", f"--owner-uid={uid}"]
        code = rayjob.main([*given, f"--account={cluster.account}", *more])
        return code, *capsys.readouterr()

    return run


def test_a_copy_is_started_and_waited_for(cluster: Cluster, start: Start) -> None:
    cluster.statuses = [{}, {"jobDeploymentStatus": "Initializing"}, RUNNING, RUNNING, SUCCEEDED]
    code, out, err = start()
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "started the RayJob nightly",
        "nightly: Initializing",
        "nightly: Running",
        "nightly: Complete",
    ]
    template, started = cluster.jobs["errata-train"], cluster.jobs["nightly"]
    assert started["spec"] == {**template["spec"], "suspend": False}
    assert template["spec"]["suspend"]
    assert started["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "nightly", "uid": "uid-1"}
    ]


def test_a_second_pod_of_the_job_goes_on_to_wait(cluster: Cluster, start: Start) -> None:
    cluster.statuses = [SUCCEEDED]
    assert start()[0] == 0
    first = copy.deepcopy(cluster.jobs["nightly"])
    code, out, _ = start()
    assert code == 0
    assert "going on to wait" in out
    assert cluster.jobs["nightly"] == first


def test_another_jobs_rayjob_is_left_alone(cluster: Cluster, start: Start) -> None:
    cluster.statuses = [SUCCEEDED]
    start()
    code, _, err = start(uid="uid-2")
    assert code == 1
    assert "another RayJob is named nightly" in err


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "reason": "AppFailed",
                "message": "No edits are queued.",
            },
            "ended as Failed, AppFailed: No edits are queued.",
        ),
        (
            {"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"},
            "ended as Failed, PreRunningDeadlineExceeded: no message",
        ),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "ended as Complete, STOPPED"),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "bad"}, "ValidationFailed"),
    ],
)
def test_a_job_that_fails_fails_with_its_message(
    cluster: Cluster, start: Start, status: JSON, said: str
) -> None:
    cluster.statuses = [RUNNING, status]
    code, _, err = start()
    assert code == 1
    assert said in err


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((403, {"message": "rayjobs.ray.io is forbidden"}), "needs the Role errata-train"),
        ((404, {"message": "the server could not find the requested resource"}), "install KubeRay"),
        ((401, {"message": "Unauthorized"}), "token is not accepted"),
        ((422, {"message": "spec.backoffLimit: Invalid value"}), "correct the RayJob"),
    ],
)
def test_a_refusal_names_the_remedy(
    cluster: Cluster, start: Start, refusal: tuple[int, JSON], said: str
) -> None:
    cluster.refusal = refusal
    code, _, err = start()
    assert code == 1
    assert err.startswith("error: reading the RayJob errata-train: ")
    assert refusal[1]["message"] in err
    assert said in err


def test_a_rayjob_that_was_not_applied(cluster: Cluster, start: Start) -> None:
    del cluster.jobs["errata-train"]
    code, _, err = start()
    assert code == 1
    assert 'rayjobs.ray.io "errata-train" not found; apply the overlay again' in err


def test_an_operator_that_is_not_there(start: Start) -> None:
    code, _, err = start()
    assert code == 1
    assert "see whether kuberay-operator runs" in err


def test_an_api_that_is_away_for_a_while(cluster: Cluster, start: Start) -> None:
    cluster.failures = 3
    cluster.statuses = [SUCCEEDED]
    assert start()[0] == 0


def test_an_api_that_stays_away_leaves_it_to_the_next_attempt(
    cluster: Cluster, start: Start
) -> None:
    cluster.failures = 1_000_000
    code, _, err = start()
    assert code == rayjob.NOT_NOW
    assert "is away: it answers 503" in err


def test_a_renewed_token_is_used(cluster: Cluster, start: Start) -> None:
    cluster.statuses = [RUNNING, SUCCEEDED]
    reading = cluster.read

    def renew(name: str) -> tuple[int, JSON]:
        cluster.renew_token(f"after {name}")
        return reading(name)

    cluster.read = renew  # type: ignore[method-assign]
    assert start()[0] == 0


def test_outside_of_a_pod(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = start("--account", str(tmp_path / "nothing"))
    assert code == 1
    assert "run this in a pod" in err
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    code, _, err = start()
    assert code == 1
    assert "run this in a pod" in err


@pytest.fixture
def queued() -> Iterator[tuple[str, list[JSON]]]:
    """The URL of a service that lists the queued edits of the list."""
    edits: list[JSON] = []

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/edits?state=queued&limit=1"
            content = json.dumps({"edits": edits}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", edits
        server.shutdown()
        thread.join()


def test_nothing_is_started_while_no_edit_is_queued(
    cluster: Cluster,
    start: Start,
    queued: tuple[str, list[JSON]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, edits = queued
    monkeypatch.setenv("ERRATA_API_URL", url)
    assert start("--if-queued") == (0, "no edit is queued: nothing to do\n", "")
    assert "nightly" not in cluster.jobs
    edits.append({"id": "ed_1"})
    cluster.statuses = [SUCCEEDED]
    assert start("--if-queued")[0] == 0
    assert "nightly" in cluster.jobs


def test_a_service_that_is_away_is_asked_by_the_next_attempt(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_API_URL", "http://127.0.0.1:1")
    code, _, err = start("--if-queued")
    assert code == rayjob.NOT_NOW
    assert "no answer from http://127.0.0.1:1" in err


def test_only_what_an_attempt_cannot_mend_ends_the_job(dev: Manifests) -> None:
    spec = dev.one("CronJob", "errata-train")["spec"]["jobTemplate"]["spec"]
    codes = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][1:]]
    assert codes == [[1]]
    assert rayjob.NOT_NOW != 1
    assert spec["backoffLimit"] > 0
