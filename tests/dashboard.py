"""Ray's dashboard: what a cluster has, and what Serve is to run on it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from service.client import JSON
from tests.faults.site import until

TOKEN = "errata-tests-cluster-token-of-no-use-elsewhere"
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
"""Of the nodes, and of who asks them; in the environment."""
PROGRAMS = Path(sys.executable).parent
SERVE_CONFIG = Path(__file__).parents[1] / "deploy" / "serve" / "serve.yaml"


class Dashboard:
    """That at `url`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30
        )

    def close(self) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """What it answers; `httpx.HTTPError` if it does not."""
        return self._http.get(path).raise_for_status().json()

    def nodes(self) -> int:
        """How many Ray has."""
        try:
            shown = self.get("/api/v0/nodes")
        except httpx.HTTPError:
            return 0
        return sum(one["state"] == "ALIVE" for one in shown["data"]["result"]["result"])

    def deploy(self, config: Path) -> None:
        """By `serve deploy`, as an operator does."""
        subprocess.run(
            [PROGRAMS / "serve", "deploy", "--address", self._url, str(config)],
            check=True,
            env={**os.environ, **AUTHENTICATION},
            timeout=60,
        )

    def application(self) -> JSON:
        """The service as Serve shows it; empty if it does not."""
        shown: JSON = self.get("/api/serve/applications/")
        return dict(shown["applications"].get("errata", {}))

    def is_deployed(self) -> bool:
        """`AssertionError` with the reason if it failed."""
        try:
            now = self.application()
        except httpx.HTTPError:
            return False
        assert now.get("status") != "DEPLOY_FAILED", now["message"]
        return now.get("status") == "RUNNING"

    def run(self, entrypoint: str) -> tuple[str, str]:
        """How a job ended, and all that it said; by Ray's Jobs API, as KubeRay starts one."""
        posted = self._http.post("/api/jobs/", json={"entrypoint": entrypoint}).raise_for_status()
        path = f"/api/jobs/{posted.json()['submission_id']}"
        status = until(lambda: self._ended(path))
        return status, str(self.get(f"{path}/logs")["logs"])

    def _ended(self, path: str) -> str | None:
        status = str(self.get(path)["status"])
        return status if status in {"STOPPED", "SUCCEEDED", "FAILED"} else None
