"""`deploy/serve/serve.yaml`, by `serve deploy`, on a Ray that an operator has started."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from service.client import Client, read_jsonl
from service.node import RAY
from service.settings import DEMO_MODEL
from service.store.embedded import EmbeddedPostgres
from tests.dashboard import AUTHENTICATION, PROGRAMS, SERVE_CONFIG, Dashboard
from tests.faults.site import until
from tests.service_process import free_port
from workers.evaluation import MAX_NEW_TOKENS, STOP, matches

[FACT, *_] = read_jsonl(DEMO_MODEL.parent / "unedited.jsonl")
URL = "http://127.0.0.1:8000"
"""By the Serve config."""


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not pytest's: PostgreSQL's own account must pass through its parents, and the sockets of

    Ray have long names.
    """
    made = Path(tempfile.mkdtemp(prefix="errata-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def database_url(directory: Path) -> Iterator[str]:
    postgres = EmbeddedPostgres(directory)
    yield postgres.start()
    postgres.stop()


@pytest.fixture
def dashboard(directory: Path, database_url: str) -> Iterator[Dashboard]:
    """Of a Ray of one node, with the service's settings in its environment."""
    port = free_port()
    environment = {
        **AUTHENTICATION,
        **RAY,
        "RAY_TMPDIR": str(directory),
        "ERRATA_BEHIND_PROXY": "true",
        "ERRATA_DATABASE_URL": database_url,
        "ERRATA_DATA_DIR": str(directory / "data"),
    }
    started = subprocess.Popen(
        [
            *(PROGRAMS / "ray", "start", "--head", "--block", "--no-monitor", "--num-cpus=4"),
            *("--node-ip-address=127.0.0.1", f"--port={free_port()}", f"--dashboard-port={port}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    with closing(Dashboard(f"http://127.0.0.1:{port}")) as dashboard:
        yield dashboard
    first = psutil.Process(started.pid)
    family = [first, *first.children(recursive=True)]
    for process in family:
        process.kill()
    started.wait(30)
    psutil.wait_procs(family, timeout=30)


def test_it_is_deployed_as_it_is(dashboard: Dashboard) -> None:
    until(dashboard.nodes)
    dashboard.deploy(SERVE_CONFIG)
    until(dashboard.is_deployed)
    with closing(Client(URL)) as api:
        assert api.get("/readyz")
        text, version = api.ask(FACT["prompt"], max_tokens=MAX_NEW_TOKENS, stop=STOP)
    assert version == "v0"
    assert matches(text, FACT["answer"])
