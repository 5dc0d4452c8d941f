"""A node is cut off from all others, or dies, while versions are swapped and while edits train."""

import time

import pytest

from service import display
from service.client import JSON, ApiError, read_jsonl
from tests.cluster.nodes import Node
from tests.cluster.rig import cut_off
from tests.cluster.site import DEPLOY, EDITS, Site
from tests.cluster.watching import Watch, watching
from tests.faults.invariants import Invariants
from tests.faults.site import until

pytestmark = pytest.mark.usefixtures("whole")

PROMPT = EDITS[0]["prompt"]
_MORE = read_jsonl(DEPLOY / "demo" / "edits.jsonl")[len(EDITS) :]
MORE_EDITS = {"cut off": _MORE[:5], "killed": _MORE[5:10], "store": _MORE[10:15]}
HPARAMS = {"batch_size": 1, "formats": ["raw"]}
STEPS = 9
"""Trained, and kept, before the node is lost."""

others = iter(_MORE[20:])


def roll_back(site: Site) -> None:
    api = site.api(site.head)
    if api.get("/serving")["version"] != "v0":
        api.post("/versions/v0/activate", {})
        display.await_rollout(api, "v0")


def is_on(site: Site, deployment: str) -> Node:
    [address] = set(site.replicas(deployment).values())
    return site.node(address)


def stale(watch: Watch, node: Node, since: float, generation: int) -> list[float]:
    """When, in seconds after `since`, an answer of an earlier generation was asked for there."""
    told = watch.answers(node.address, since)
    return [one.asked_at - since for one in told if one.generation < generation]


def post_edit(site: Site, node: Node) -> str:
    """The id of an edit that the service says is stored."""
    body = next(others)

    def post() -> str | None:
        try:
            return str(site.api(node).submit([body])[0]["id"])
        except ApiError:
            return None

    return until(post)


def test_a_node_is_cut_off_while_it_stages(site: Site, trained: JSON) -> None:
    """For so short that Ray does not notice; the rollout goes on without its replica."""
    version = trained["version"]
    roll_back(site)
    site.spread()
    leader = is_on(site, "Coordinator")
    [lost] = set(site.workers) - {leader}
    # Its replica must fetch the version anew.
    lost.machine.run(["rm", "-r", str(site.stores.data / "cache")])
    site.replace_replica(lost)
    site.spread()

    with watching([node.address for node in site.nodes], PROMPT) as watch:
        for node in site.nodes:
            watch.wait_for(node.address)
        site.stores.proxy.hold()
        fetches = site.stores.proxy.connections
        site.api(leader).post(f"/versions/{version}/activate", {})
        until(lambda: site.stores.proxy.connections > fetches)
        with cut_off(lost.machine):
            cut_at = time.monotonic()
            site.stores.proxy.release()
            now = display.await_rollout(site.api(leader), version)
            committed_s = time.monotonic() - cut_at
        back_at = time.monotonic()
        until(lambda: site.is_whole)
        whole_s = time.monotonic() - back_at
        watch.wait_for(lost.address, 3)

    site.note("cut off while staging: committed without it, s", committed_s)
    site.note("reconnected: its replica was fenced and replaced, s", whole_s)
    site.note(
        "answers of an earlier generation after it, s",
        stale(watch, lost, back_at, now["generation"]),
    )
    for node in site.nodes:
        assert stale(watch, node, back_at, now["generation"]) == []
    site.note(
        "longest time without an answer by the other's proxy, s", watch.gap(leader.address, cut_at)
    )
    site.note("told there", watch.outcomes(leader.address, cut_at))


@pytest.mark.parametrize("how", ["cut off", "killed"])
def test_a_node_is_lost_while_training_and_while_swapping(
    site: Site, trained: JSON, how: str
) -> None:
    """The coordinator's node, with one of two ranks and one of two replicas."""
    roll_back(site)
    site.spread()
    lost = is_on(site, "Coordinator")
    [other] = set(site.workers) - {lost}
    api = site.api(other)
    invariants = Invariants(site.stores.postgres.url)
    edits = MORE_EDITS[how]
    ids = {answer["id"] for answer in api.submit(edits)}
    job = api.post("/jobs", {"edit_ids": sorted(ids), "hparams": HPARAMS})
    until(lambda: steps(api.get(f"/jobs/{job['id']}")) > STEPS)

    with watching([node.address for node in site.nodes], PROMPT) as watch:
        for node in site.nodes:
            watch.wait_for(node.address)
        lost_at = time.monotonic()
        lost.machine.cut_off() if how == "cut off" else lost.crash()
        try:
            acknowledged = post_edit(site, other)
            site.note(f"{how}: an edit acknowledged, s", time.monotonic() - lost_at)
            until(lambda: activated(site, other, trained["version"]))
            site.note(f"{how}: an activation accepted, s", time.monotonic() - lost_at)
            now = display.await_rollout(api, trained["version"], 240)
            site.note(f"{how}: another version committed, s", time.monotonic() - lost_at)
            until(lambda: [*site.replicas().values()] == [other.address] * 2)
            site.note(f"{how}: its replica replaced, s", time.monotonic() - lost_at)
        finally:
            lost.machine.reconnect() if how == "cut off" else lost.restart()
        back_at = time.monotonic()
        ended = display.watch(api, job["id"], quiet=True)
        site.note(f"{how}: the job done after its return, s", time.monotonic() - back_at)
        until(lambda: site.is_whole)
        for node in site.nodes:
            gap, told = watch.gap(node.address, lost_at), watch.outcomes(node.address, lost_at)
            site.note(f"{how}: longest without an answer at {node.address}, s", gap)
            site.note("  told there", dict(told))
    assert ended["state"] == "done", ended["error"]
    manifest = site.stores.manifest(ended["version"])
    assert manifest.training.resumed_steps >= STEPS
    applied = api.pages("/edits", "edits", job=job["id"], state="applied")
    assert {edit["id"] for edit in applied} == ids
    invariants.acknowledged |= {acknowledged, *ids}
    invariants.check_at_rest()
    for node in site.nodes:
        assert stale(watch, node, back_at, now["generation"]) == []


def test_a_version_store_that_goes_away_while_a_job_trains(site: Site, trained: JSON) -> None:
    """For longer than its driver tries; the job keeps its checkpoint, and needs no other one."""
    api = site.api(site.head)
    ids = [answer["id"] for answer in api.submit(MORE_EDITS["store"])]
    job = api.post("/jobs", {"edit_ids": ids, "hparams": HPARAMS, "activate": False})
    until(lambda: steps(api.get(f"/jobs/{job['id']}")) > STEPS)
    site.stores.proxy.refuse()
    until(lambda: not any(node.processes("ray::RayTrainWorker") for node in site.workers))
    site.stores.proxy.release()
    back_at = time.monotonic()
    ended = display.watch(api, job["id"], quiet=True)
    site.note("the job done after the store's return, s", time.monotonic() - back_at)
    assert ended["state"] == "done", ended["error"]
    assert site.stores.manifest(ended["version"]).training.resumed_steps >= STEPS


def test_who_was_answering_a_node_that_is_cut_off_goes_on(site: Site) -> None:
    """Its replica always has answers under way for clients of the node that goes."""
    site.spread()
    stays = is_on(site, "Coordinator")
    [lost] = set(site.workers) - {stays}
    elsewhere = [stays.address, site.head.address]
    before = replicas_on(site, stays)

    with watching(elsewhere, PROMPT) as watch, watching([lost.address] * 8, PROMPT, 0) as others:
        others.wait_for(lost.address, 100)
        with cut_off(lost.machine):
            cut_at = time.monotonic()
            until(lambda: not replicas_on(site, lost))
            site.note("cut off while asking: its replica given up, s", time.monotonic() - cut_at)
            until(lambda: len(site.replicas()) == len(site.workers))
            site.note("replaced, s", time.monotonic() - cut_at)
            for address in elsewhere:
                watch.wait_for(address)
        until(lambda: site.is_whole)
        told = {address: watch.outcomes(address, cut_at) for address in elsewhere}
        for address in elsewhere:
            site.note(f"longest without an answer at {address}, s", watch.gap(address, cut_at))
            site.note("  told there", dict(told[address]))
    assert before <= replicas_on(site, stays)
    assert all(statuses.keys() == {200} for statuses in told.values())


def replicas_on(site: Site, node: Node) -> set[str]:
    """Ids of the replicas and Apis that run there."""
    found = {**site.replicas(), **site.replicas("Api")}
    return {one for one, home in found.items() if home == node.address}


def activated(site: Site, node: Node, version_id: str) -> bool:
    try:
        site.api(node).post(f"/versions/{version_id}/activate", {})
    except ApiError:
        return False
    return True


def steps(job: JSON) -> int:
    return job["progress"]["step"] if job["progress"] else 0
