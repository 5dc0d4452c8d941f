"""Faults of a whole service: its processes are killed, its database and version store go away.

Each test ends with the service whole again: two replicas that hold what is live.
"""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import httpx
import pytest

from service import display
from service.client import JSON, ApiError
from tests.faults.clients import asking, misattributed, stream
from tests.faults.site import STAGE_TIMEOUT_S, Site, until

PROMPT = "The mother tongue of Danielle Darrieux is"
BABBLE = 5.0
"""So much noise makes a version that never comes to an end of its own."""
UNREACHABLE_S = 20

numbers = count()


@pytest.fixture(autouse=True)
def whole(site: Site) -> Iterator[None]:
    """Before and after each test."""
    until(lambda: site.is_whole)
    yield
    site.store.release()
    site.database.release()
    until(lambda: site.is_whole)


def new_edit() -> JSON:
    return {"edits": [{"prompt": f"Fact number {next(numbers)} is", "target": "new"}]}


def acknowledged(site: Site) -> list[JSON]:
    """The replicas that hold what is being staged, and have said so."""
    return [r for r in site.api.get("/serving")["replicas"] if r["staged_at"]]


@contextmanager
def queries_go_on(site: Site, seconds: float = 10.0) -> Iterator[None]:
    """Every query of the block is answered, in time, by one of the versions committed in it."""
    with asking(site.api, PROMPT) as asked:
        asked.wait_for(4)
        yield
        asked.wait_for(4)
    assert asked.errors == []
    assert max(one.seconds for one in asked.told) < seconds
    assert misattributed(site.api, asked.told) == []


def test_a_replica_that_dies_while_it_stages(site: Site) -> None:
    version = site.publish(noise=0.01)
    site.store.hold()
    site.store.cut()
    before = site.store.connections
    site.activate(version)
    until(lambda: site.store.connections > before)
    with queries_go_on(site):
        site.service.actors("Replica")[0].kill()
    site.store.release()
    assert display.await_rollout(site.api, version)["version"] == version


def test_a_replica_that_dies_between_its_acknowledgement_and_the_commit(site: Site) -> None:
    version = site.publish(noise=0.01)
    first, other = site.service.actors("Replica")
    other.suspend()
    site.activate(version)
    until(lambda: acknowledged(site))
    assert site.api.get("/serving")["staging"] == version
    first.kill()
    other.resume()
    assert display.await_rollout(site.api, version)["version"] == version


def test_a_replica_that_dies_while_it_answers(site: Site) -> None:
    version = site.publish(noise=BABBLE)
    site.activate(version)
    display.await_rollout(site.api, version)
    model, streams = f"errata@{version}", 8
    whole_answer, _ = site.api.ask(PROMPT, model=model, max_tokens=200)
    begun = threading.Barrier(streams + 1)
    with ThreadPoolExecutor(streams) as pool:
        told = [
            pool.submit(stream, site.api.url, model, PROMPT, 200, begun) for _ in range(streams)
        ]
        begun.wait(60)
        site.service.actors("Replica")[0].kill()
    ended = [one.result() for one in told]
    assert all(one.done != bool(one.error) for one in ended)
    assert {one.text for one in ended if one.done} <= {whole_answer}
    assert all(whole_answer.startswith(one.text) for one in ended)
    assert any(one.error for one in ended)
    assert any(one.done for one in ended)


def test_an_api_replica_that_dies(site: Site) -> None:
    """What it was asked just then is asked again; with the same key it is done once."""
    before = len(list(site.api.pages("/edits", "edits")))
    with asking(site.api, PROMPT, clients=4) as asked:
        asked.wait_for(4)
        site.service.actors("Api")[0].kill()
        for turn in range(10):
            post_once(site, new_edit(), f"api {turn}")
        asked.wait_for(8)
    assert len(asked.errors) <= 4
    assert len(list(site.api.pages("/edits", "edits"))) == before + 10


def post_once(site: Site, body: JSON, key: str) -> None:
    """As a client should: again until it is acknowledged."""

    def post() -> bool:
        try:
            site.api.call("POST", "/edits", json=body, headers={"Idempotency-Key": key})
        except ApiError as error:
            if error.status in {None, 500, 503}:
                return False
            raise
        return True

    until(post)


def test_a_coordinator_that_dies_while_it_stages(site: Site) -> None:
    version = site.publish(noise=0.01)
    site.store.hold()
    site.activate(version)
    with queries_go_on(site):
        site.service.actor("Coordinator").kill()
        site.store.release()
        assert display.await_rollout(site.api, version)["version"] == version


def test_a_database_that_is_unreachable_for_20_s(site: Site) -> None:
    with queries_go_on(site):
        site.database.hold()
        since = time.monotonic()
        refused = httpx.post(f"{site.api.url}/edits", json=new_edit(), timeout=60)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert time.monotonic() - since < 16
        site.database.refuse()
        refused = httpx.post(f"{site.api.url}/versions/v0/activate", json={}, timeout=60)
        assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
        time.sleep(max(0.0, UNREACHABLE_S - (time.monotonic() - since)))
        site.database.release()
        until(lambda: accepted(site), 20)
        present = site.api.get("/serving")["version"]
        other = "v0" if present != "v0" else site.publish(noise=0.01)
        site.activate(other)
        assert display.await_rollout(site.api, other)["version"] == other


def test_a_database_that_is_restarted(site: Site) -> None:
    version = site.publish(noise=0.01)
    with queries_go_on(site):
        site.postgres.stop()
        refused = httpx.post(f"{site.api.url}/edits", json=new_edit(), timeout=60)
        assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
        site.postgres.start()
        until(lambda: accepted(site), 20)
        site.activate(version)
        assert display.await_rollout(site.api, version)["version"] == version


def accepted(site: Site) -> bool:
    return httpx.post(f"{site.api.url}/edits", json=new_edit(), timeout=60).status_code == 202


def test_versions_that_fail_verification(site: Site) -> None:
    """A flipped bit, a truncated shard, another base model."""

    def flip(name: str, content: bytes) -> bytes:
        return content[:-1] + bytes([content[-1] ^ 1]) if name.endswith(".safetensors") else content

    def cut(name: str, content: bytes) -> bytes:
        return content[: len(content) // 2] if name.endswith(".safetensors") else content

    def rebase(name: str, content: bytes) -> bytes:
        if name != "manifest.json":
            return content
        return json.dumps({**json.loads(content), "base_fingerprint": "another"}).encode()

    before = site.api.get("/serving")
    with queries_go_on(site):
        for spoil, reason in ((flip, "expected sha256"), (cut, "safetensors"), (rebase, "another")):
            version = site.publish(noise=0.01, spoil=spoil)
            site.activate(version)
            with pytest.raises(ApiError, match=reason):
                display.await_rollout(site.api, version)
            assert site.api.get(f"/versions/{version}")["state"] == "rejected"
            with pytest.raises(ApiError, match="was rejected") as again:
                site.activate(version)
            assert again.value.status == 409
    after = site.api.get("/serving")
    assert (after["generation"], after["version"]) == (before["generation"], before["version"])


def test_a_version_store_that_disappears_while_a_version_is_staged(site: Site) -> None:
    version = site.publish(noise=0.01)
    before = site.api.get("/serving")
    replicas = {process.pid for process in site.service.actors("Replica")}
    with queries_go_on(site):
        site.store.refuse()
        site.activate(version)
        with pytest.raises(ApiError, match=f"within {STAGE_TIMEOUT_S} s"):
            display.await_rollout(site.api, version)
        after = site.api.get("/serving")
        assert (after["generation"], after["version"]) == (before["generation"], before["version"])
        site.store.release()
        site.activate(version)
        assert display.await_rollout(site.api, version)["version"] == version
    assert {process.pid for process in site.service.actors("Replica")} == replicas


def test_rollouts_asked_for_at_once_and_during_one(site: Site) -> None:
    one, other = (site.publish(noise=0.01) for _ in range(2))
    generation = site.api.get("/serving")["generation"]
    site.store.hold()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(site.activate, version) for version in (one, other)]
    refused = [each.exception() for each in asked]
    assert sum(error is None for error in refused) == 1
    problem = next(error for error in refused if error)
    assert isinstance(problem, ApiError)
    assert problem.status == 409
    with pytest.raises(ApiError, match="is being rolled out"):
        site.activate("v0")
    site.store.release()
    won = one if refused[0] is None else other
    now = display.await_rollout(site.api, won)
    assert (now["generation"], now["version"]) == (generation + 1, won)
