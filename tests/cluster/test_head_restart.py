"""The head dies and is started again; what it knew is in Redis."""

import time
from collections.abc import Callable

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


def kill_ray(site: Site) -> None:
    """As when the container of the head fails: its machine starts it again."""
    for process in named(site.head, *RAY_HEAD):
        process.kill()


def replace_machine(site: Site) -> None:
    """As when the pod of the head is lost: the next one has its name, and another address."""
    site.cluster.replace_head()


@pytest.mark.parametrize("restart", [kill_ray, replace_machine])
def test_queries_go_on_and_a_job_runs_afterwards(
    site: Site, trained: JSON, restart: Callable[[Site], None]
) -> None:
    first, second = site.workers
    before, replicas = raylets(site), site.replicas()
    with watching([node.address for node in site.workers], PROMPT) as watch:
        for node in site.workers:
            watch.wait_for(node.address)
        killed_at = time.monotonic()
        restart(site)
        stored = site.api(first).submit([{"prompt": "What the head missed is", "target": "new"}])
        with watching([site.head.address], PROMPT) as at_head:
            until(lambda: site.is_whole)
            whole_s = time.monotonic() - killed_at
            at_head.wait_for(site.head.address, 3)
            for clients, node in ((at_head, site.head), (watch, first), (watch, second)):
                gap = clients.gap(node.address, killed_at)
                site.note(f"{restart.__name__}: gap at {node.address}, s", gap)
                told = clients.outcomes(node.address, killed_at)
                site.note("  told there", dict(told))
    site.note(f"{restart.__name__}: whole again, s", whole_s)
    assert site.replicas() == replicas
    after = raylets(site)
    assert after[site.head.address] not in before.values()
    assert [after[node.address] for node in site.workers] == [
        before[node.address] for node in site.workers
    ]

    api = site.api(second)
    job = api.post(
        "/jobs", {"edit_ids": [stored[0]["id"]], "hparams": ONE_EPOCH, "activate": False}
    )
    ended = display.watch(api, job["id"], quiet=True)
    assert ended["state"] == "done", ended["error"]
