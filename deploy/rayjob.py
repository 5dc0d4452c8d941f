"""`python -m deploy.rayjob`: starts a copy of a suspended RayJob, and waits for its end.

Run by the CronJob `errata-train`, in a pod, with the pod's ServiceAccount. Knows Kubernetes' API
and a RayJob's status; what the job does, and on what, is in the suspended RayJob.
"""

import argparse
import os
import ssl
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from service.client import ApiError, Client

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ENDED = {"Complete", "Failed", "ValidationFailed"}
"""RayJob's `jobDeploymentStatus` at its end."""
POLL_S = 5.0
UNSEEN_S = 120.0
"""So long KubeRay may take to look at a new RayJob."""
AWAY_S = 300.0
"""So long Kubernetes' API may be away."""
NOT_NOW = 3
"""Exit code: nothing is wrong with the job, another attempt may go on."""

JSON = dict[str, Any]


class RayJobError(Exception):
    """The job has not been done; the message says why, and what to do."""


class Away(RayJobError):
    """Kubernetes' API does not answer."""


class RayJobs:
    """The RayJobs of the pod's own namespace."""

    def __init__(self, url: str, account: Path) -> None:
        """`account`: the folder with a ServiceAccount's `token`, `ca.crt` and `namespace`."""
        self._account = account
        try:
            namespace = (account / "namespace").read_text().strip()
            self._http = httpx.Client(
                base_url=f"{url}/apis/ray.io/v1/namespaces/{namespace}/rayjobs",
                verify=ssl.create_default_context(cafile=account / "ca.crt"),
                timeout=30,
            )
        except OSError as error:
            raise RayJobError(
                f"{account} is not a ServiceAccount ({error.strerror}); run this in a pod, with "
                "automountServiceAccountToken"
            ) from error

    def __enter__(self) -> "RayJobs":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._http.close()

    def start(self, template: str, name: str, owner_uid: str) -> None:
        """Creates RayJob `name` unless an earlier attempt of the same owner, a Job, has done so."""
        source = self._call("GET", f"/{template}", f"reading the RayJob {template}")
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": owner_uid}
        copy = {
            "apiVersion": source["apiVersion"],
            "kind": source["kind"],
            "metadata": {
                "name": name,
                "labels": source["metadata"].get("labels", {}),
                "ownerReferences": [owner],
            },
            "spec": {**source["spec"], "suspend": False},
        }
        try:
            self._call("POST", "", f"creating the RayJob {name}", copy)
            print(f"started the RayJob {name}", flush=True)
        except AlreadyThere:
            there = self._call("GET", f"/{name}", f"reading the RayJob {name}")
            owners = {o["uid"] for o in there["metadata"].get("ownerReferences", [])}
            if owner_uid not in owners:
                raise RayJobError(
                    f"another RayJob is named {name}; give the Job another name"
                ) from None
            print(f"going on to wait for the RayJob {name}", flush=True)

    def wait(self, name: str) -> None:
        """Returns when the job has succeeded; raises `RayJobError` if it ends otherwise."""
        began, last = time.monotonic(), ""
        while True:
            job = self._call("GET", f"/{name}", f"looking at the RayJob {name}")
            status = job.get("status", {})
            state = status.get("jobDeploymentStatus", "")
            if state != last:
                print(f"{name}: {state}", flush=True)
                last = state
            if state in ENDED:
                require_success(name, status)
                return
            if not state and time.monotonic() - began > UNSEEN_S:
                raise RayJobError(
                    f"no operator has looked at the RayJob {name} for {UNSEEN_S:.0f} s; "
                    "see whether kuberay-operator runs, and watches this namespace"
                )
            time.sleep(POLL_S)

    def _call(self, method: str, path: str, doing: str, body: JSON | None = None) -> JSON:
        """Asks again while Kubernetes' API is away."""
        deadline = time.monotonic() + AWAY_S
        while True:
            # The token is renewed while the pod runs.
            token = (self._account / "token").read_text().strip()
            try:
                response = self._http.request(
                    method, path, json=body, headers={"Authorization": f"Bearer {token}"}
                )
                away = f"it answers {response.status_code}"
                if response.status_code != 429 and response.status_code < 500:
                    return answer(response, doing)
            except httpx.TransportError as error:
                away = str(error)
            if time.monotonic() > deadline:
                raise Away(f"{doing}: Kubernetes' API at {self._http.base_url} is away: {away}")
            time.sleep(POLL_S)


class AlreadyThere(RayJobError): ...


def answer(response: httpx.Response, doing: str) -> JSON:
    """The body; or what Kubernetes has against it, and what to do."""
    if response.is_success:
        return dict(response.json())
    status: JSON = response.json() if "json" in response.headers.get("content-type", "") else {}
    message = status.get("message", response.text.strip())
    if response.status_code == 409:
        raise AlreadyThere(message)
    if response.status_code == 404 and not status.get("details", {}).get("name"):
        remedy = "RayJobs are not known here: install KubeRay with its CRDs"
    else:
        remedy = {
            401: "the ServiceAccount's token is not accepted: is its ServiceAccount still there?",
            403: "its ServiceAccount needs the Role errata-train: get and create of rayjobs.ray.io",
            404: "apply the overlay again: it holds the RayJob",
        }.get(response.status_code, "correct the RayJob of the overlay, and apply it again")
    raise RayJobError(f"{doing}: {message}; {remedy}")


def require_success(name: str, status: JSON) -> None:
    if status.get("jobStatus") == "SUCCEEDED":
        return
    reason = status.get("reason") or status.get("jobStatus") or "no reason given"
    said = status.get("message") or "no message"
    raise RayJobError(
        f"the RayJob {name} ended as {status['jobDeploymentStatus']}, {reason}: {said}"
    )


def edits_are_queued() -> bool:
    """Asks the service that `ERRATA_API_URL` names."""
    with Client(os.environ["ERRATA_API_URL"], os.environ.get("ERRATA_API_KEY")) as api:
        return bool(api.get("/edits", state="queued", limit=1)["edits"])


def api_url() -> str:
    """Kubernetes' API, as a pod is told."""
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if host is None:
        raise RayJobError("KUBERNETES_SERVICE_HOST is not set; run this in a pod")
    return f"https://{f'[{host}]' if ':' in host else host}:{port}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the job is done, or there was nothing to do."""
    parser = argparse.ArgumentParser(prog="python -m deploy.rayjob", description=__doc__)
    parser.add_argument("template", help="the suspended RayJob")
    parser.add_argument("--name", required=True, help="of the Job that this runs for, and the copy")
    parser.add_argument("--owner-uid", required=True, help="that Job's uid: the copy goes with it")
    parser.add_argument(
        "--if-queued", action="store_true", help="do nothing if ERRATA_API_URL has no queued edit"
    )
    parser.add_argument("--account", type=Path, default=ACCOUNT, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        if given.if_queued and not edits_are_queued():
            print("no edit is queued: nothing to do")
            return 0
        with RayJobs(api_url(), given.account) as jobs:
            jobs.start(given.template, given.name, given.owner_uid)
            jobs.wait(given.name)
    except (RayJobError, ApiError) as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_NOW if isinstance(error, Away | ApiError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
