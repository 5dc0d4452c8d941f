"""Anything in any order, while processes are killed: what must hold does after every step.

`ERRATA_TEST_SEED` sets the order; a run that fails shows its seed.
"""

import os
import random
import time
from itertools import count

import pytest

from service.client import JSON, ApiError
from tests.faults.clients import Told, ask, asking, misattributed
from tests.faults.invariants import Invariants
from tests.faults.site import PROCESSES, Site, until

SEED = int(os.environ.get("ERRATA_TEST_SEED", "1"))
OPERATIONS = {
    "query": 112,
    "submit": 40,
    "activate": 32,
    "canary": 18,
    "job": 2,
    "kill_replica": 6,
    "kill_coordinator": 4,
    "kill_api": 5,
}
PROMPTS = (
    "The mother tongue of Danielle Darrieux is",
    "The capital of France is",
    "Anaal Nathrakh was created in",
)
HPARAMS = {"max_epochs": 1, "formats": ["raw"]}


class Run:
    """The operations; what was told and killed in them."""

    def __init__(self, site: Site, seed: int) -> None:
        self._site = site
        self._random = random.Random(seed)
        self._keys = count()
        self._versions = ["v0", *(site.publish(noise=0.3) for _ in range(3))]
        self.invariants = Invariants(site.database_url)
        self.told: list[Told] = []
        self.kills = 0

    def all(self) -> None:
        """Every operation, in an order of the seed's; all that must hold is checked after each."""
        for name in self._order():
            getattr(self, name)()
            self.invariants.check()

    def _order(self) -> list[str]:
        """Jobs come after the last coordinator was killed, which would begin their training anew.

        `test_kill` sees to that; each time takes half a minute.
        """
        names = [name for name, times in OPERATIONS.items() for _ in range(times)]
        others = [name for name in names if name != "job"]
        self._random.shuffle(others)
        last = max(at for at, name in enumerate(others) if name == "kill_coordinator")
        for _ in range(OPERATIONS["job"]):
            others.insert(self._random.randint(last + 1, len(others)), "job")
        return others

    def submit(self) -> None:
        fact = self._random.randrange(40)
        body = {"edits": [{"prompt": f"Random fact {fact} is", "target": "new"}]}
        answer = self._once("/edits", body)
        self.invariants.acknowledged |= {edit["id"] for edit in answer["edits"]}

    def job(self) -> None:
        self._once("/jobs", {"hparams": HPARAMS})

    def activate(self) -> None:
        """Once the rollout under way has ended: how many commits there are is a matter of the

        order, not of the machine's speed.
        """
        version = self._random.choice(self._versions)
        path = f"/versions/{version}/activate"
        until(lambda: "is being rolled out" not in self._once(path, {}).get("conflict", ""))

    def canary(self) -> None:
        version = self._random.choice(self._versions)
        self._once(f"/versions/{version}/activate", {"percent": 50})

    def kill_replica(self) -> None:
        """Not the last one that serves."""
        if self.invariants.serving_replicas() > 1:
            self._kill("Replica")

    def kill_coordinator(self) -> None:
        self._kill("Coordinator")

    def kill_api(self) -> None:
        self._kill("Api")

    def query(self) -> None:
        named = [f"errata@{version}" for version in self._versions]
        wanted = self._random.choice(["errata", "errata", *named])
        prompt = self._random.choice(PROMPTS)
        told = ask(self._site.api, prompt, wanted)
        if told.error is None:
            assert wanted in {"errata", f"errata@{told.version}"}
        else:
            self._require_excused(told.error)
        self.told.append(told)

    def _once(self, path: str, body: JSON) -> JSON:
        """Asked until it is answered; a conflict is an answer."""
        headers = {"Idempotency-Key": f"random {SEED} {next(self._keys)} {time.time_ns()}"}

        def post() -> JSON | None:
            try:
                return dict(self._site.api.call("POST", path, json=body, headers=headers).json())
            except ApiError as error:
                if error.status == 409:
                    return {"conflict": error.detail}
                self._require_excused(error)
                return None

        return until(post)

    def _require_excused(self, error: ApiError) -> None:
        """After a kill, what was under way may fail: clearly, and to be tried again."""
        assert self.kills
        assert error.status in {None, 500, 503}, error

    def _kill(self, name: str) -> None:
        """Unless one was killed just now."""
        actors = self._site.service.actors(name)
        if len(actors) == PROCESSES[name]:
            self.kills += 1
            self._random.choice(actors).kill()


@pytest.fixture
def run(site: Site) -> Run:
    until(lambda: site.is_whole)
    return Run(site, SEED)


def test_anything_in_any_order(site: Site, run: Run) -> None:
    print(f"ERRATA_TEST_SEED={SEED}")
    before = site.api.get("/serving")["generation"]
    with asking(site.api, PROMPTS[0]) as asked:
        run.all()
    print(f"{run.kills} kills, {len(asked.told)} answers beside the operations")
    until(lambda: site.is_whole and not unfinished(site), 600)
    run.invariants.check_at_rest()
    assert misattributed(site.api, [*run.told, *asked.told]) == []
    assert len({(one.version, one.text) for one in run.told}) > len(PROMPTS)
    assert len(asked.errors) <= 2 * run.kills
    assert site.api.get("/serving")["generation"] > before + 10


def unfinished(site: Site) -> list[str]:
    found = site.api.get("/jobs", limit=100)["jobs"]
    return [job["id"] for job in found if job["state"] not in {"done", "failed", "cancelled"}]
