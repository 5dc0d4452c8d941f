"""The head dies and is started again; what it knew is in Redis."""

import time

import psutil
import pytest

from service import display
from service.client import JSON
from tests.cluster.nodes import Node
from tests.cluster.site import EDITS, Site
from tests.cluster.watching import watching
from tests.faults.site import until

pytestmark = pytest.mark.usefixtures("whole")

PROMPT = EDITS[0]["prompt"]
ONE_EPOCH = {"max_epochs": 1, "formats": ["raw"]}
RAY_HEAD = ("gcs_server", "raylet")


def raylets(site: Site) -> dict[str, list[int]]:
    return {node.address: [one.pid for one in named(node, "raylet")] for node in site.nodes}


def named(node: Node, *names: str) -> list[psutil.Process]:
    return [one for one in node.machine.processes() if one.name() in names]


def test_queries_go_on_and_a_job_runs_afterwards(site: Site, trained: JSON) -> None:
    first, second = site.workers
    before, replicas = raylets(site), site.replicas()
    with watching([node.address for node in site.nodes], PROMPT) as watch:
        for node in site.nodes:
            watch.wait_for(node.address)
        killed_at = time.monotonic()
        for process in named(site.head, *RAY_HEAD):
            process.kill()
        stored = site.api(first).submit([{"prompt": "What the head missed is", "target": "new"}])
        until(lambda: site.is_whole)
        whole_s = time.monotonic() - killed_at
        watch.wait_for(site.head.address, 3)
        for node in site.nodes:
            gap = watch.gap(node.address, killed_at)
            told = watch.outcomes(node.address, killed_at)
            site.note(f"head restart: gap at {node.address}, s", gap)
            site.note("  told there", dict(told))
    site.note("head restart: whole again, s", whole_s)
    assert site.replicas() == replicas
    after = raylets(site)
    assert after[site.head.address] != before[site.head.address]
    assert [after[node.address] for node in site.workers] == [
        before[node.address] for node in site.workers
    ]

    api = site.api(second)
    job = api.post(
        "/jobs", {"edit_ids": [stored[0]["id"]], "hparams": ONE_EPOCH, "activate": False}
    )
    ended = display.watch(api, job["id"], quiet=True)
    assert ended["state"] == "done", ended["error"]
