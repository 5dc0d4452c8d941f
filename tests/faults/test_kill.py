"""kill -9 of everything in mid-job, of the next coordinator, of the replicas; a rotten shard."""

from collections.abc import Callable
from pathlib import Path

import pytest

from service import display
from service.client import JSON, ApiError, Client, read_jsonl
from tests.service_process import ServiceProcess
from workers.artifact import read_manifest

EDITS = read_jsonl(Path(__file__).parents[2] / "deploy" / "demo" / "edits.jsonl")[:10]


def test_acknowledged_edits_survive_and_are_applied(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    first = ServiceProcess(data_dir, ERRATA_CHECKPOINT_EVERY_S="0")
    ids = {answer["id"] for answer in first.client.submit(EDITS)}
    hparams = {"batch_size": 1, "formats": ["raw"]}
    job = first.client.post("/jobs", {"kind": "extend", "hparams": hparams})
    wait_for(first.client, f"/jobs/{job['id']}", lambda item: steps(item) > 9)
    first.kill_everything()

    second = ServiceProcess(data_dir)
    try:
        api = second.client
        assert {edit["id"] for edit in api.pages("/edits", "edits", state="claimed")} == ids
        second.actor("Coordinator").kill()
        ended = display.watch(api, job["id"], quiet=True)
        assert ended["state"] == "done", ended["error"]
        assert {edit["id"] for edit in api.pages("/edits", "edits", state="applied")} == ids
        trained = read_manifest(str(data_dir / "store"), ended["version"]).training
        assert trained.resumed_steps >= 9
        reject_a_rotten_shard(second, data_dir / "store", ended["version"])
    finally:
        assert second.stop() == 0


def reject_a_rotten_shard(service: ServiceProcess, store: Path, version: str) -> None:
    """The version is no longer resident when it is asked for again: its replicas were killed."""
    api = service.client
    api.post("/versions/v0/activate", {})
    display.await_rollout(api, "v0")
    answer = api.ask(EDITS[0]["prompt"])
    shard, expected = flip_a_bit(store, version)
    for _ in range(len(api.get("/serving")["replicas"])):
        service.actor("Replica").kill()
    api.post(f"/versions/{version}/activate", {})
    with pytest.raises(ApiError, match=shard) as caught:
        display.await_rollout(api, version)
    assert expected in caught.value.detail
    assert api.get(f"/versions/{version}")["state"] == "rejected"
    with pytest.raises(ApiError, match=shard) as again:
        api.post(f"/versions/{version}/activate", {})
    assert again.value.status == 409
    assert api.get("/serving")["version"] == "v0"
    assert api.ask(EDITS[0]["prompt"]) == answer


def steps(job: JSON) -> int:
    return job["progress"]["step"] if job["progress"] else 0


def wait_for(api: Client, path: str, reached: Callable[[JSON], bool]) -> None:
    while not reached(api.get(path)):
        pass


def flip_a_bit(store: Path, version: str) -> tuple[str, str]:
    """Spoils the version's first shard; returns its name and the digest it should have."""
    shard = read_manifest(str(store), version).tensors[0].shards[0]
    path = store / "versions" / version / shard.file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return shard.file, shard.sha256
