"""kill -9 of everything in mid-job, and of the next coordinator: nothing acknowledged is lost."""

import json
from pathlib import Path

from service import display
from service.client import JSON, read_jsonl
from tests.faults.site import Site, until

EDITS = read_jsonl(Path(__file__).parents[2] / "deploy" / "demo" / "edits.jsonl")[:5]


def test_acknowledged_edits_survive_and_are_applied(site: Site) -> None:
    ids = {answer["id"] for answer in site.api.submit(EDITS)}
    hparams = {"batch_size": 1, "formats": ["raw"]}
    job = site.api.post("/jobs", {"edit_ids": sorted(ids), "hparams": hparams})
    until(lambda: steps(site.api.get(f"/jobs/{job['id']}")) > 9)
    site.kill_everything()

    site.start()
    assert {edit["id"] for edit in site.api.pages("/edits", "edits", state="claimed")} == ids
    site.service.actor("Coordinator").kill()
    ended = display.watch(site.api, job["id"], quiet=True)
    assert ended["state"] == "done", ended["error"]
    applied = site.api.pages("/edits", "edits", job=job["id"], state="applied")
    assert {edit["id"] for edit in applied} == ids
    version = ended["version"]
    manifest = json.loads(site.objects.get(f"versions/{version}/manifest.json"))
    assert manifest["training"]["resumed_steps"] >= 9
    assert site.api.ask(EDITS[0]["prompt"])[1] == version
    until(lambda: site.is_whole)


def steps(job: JSON) -> int:
    return job["progress"]["step"] if job["progress"] else 0
