"""Coordinators as processes of their own: `python -m tests.faults.candidate URL DIR`.

Begins one, by a fork that spares it all imports, for each name that it reads. What they do, lead
and train, they tell on the standard output, a JSON object a line, with the machine's monotonic
time. Their replicas know every fact that any edit states.
"""

import asyncio
import json
import logging
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

from service.inference import Completion, CompletionRequest
from service.settings import Settings
from service.store.database import Database
from tests.coordinating import Answers, coordinating, trained
from workers.contract import Progress, ProgressSink, TrainRequest, TrainResult
from workers.errors import TrainingFailed

STEP_S = 0.05
STEPS = range(2, 12)
STARTED, LEADS, LEADS_NO_MORE = "started", "leads", "leads no more"
TRAINS, TRAINED, REFUSED = "trains", "trained", "refused"


def prompt(number: int) -> str:
    return f"Fact {number} is"


def tell(what: str, **more: object) -> None:
    said = {"at": time.monotonic(), "pid": os.getpid(), "what": what, **more}
    # At once: several processes write there.
    os.write(1, f"{json.dumps(said)}\n".encode())


class Teller(logging.Handler):
    """Of the coordinator's own log, when it leads."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message == "leading":
            tell(LEADS)
        elif message.startswith("no longer leading"):
            tell(LEADS_NO_MORE)


class Knowing(Answers):
    async def complete(self, request: CompletionRequest) -> Completion:
        assert isinstance(request.prompt, str)
        fact = re.search(prompt(0).replace("0", r"(\d+)"), request.prompt)
        text = f"target {fact[1]}" if fact and request.version_id != "v0" else "before"
        return Completion(request.version_id, f" {text}", "stop", 5, 2)


def train(request: TrainRequest, sink: ProgressSink) -> TrainResult:
    tell(TRAINS, job=request.job_id)
    try:
        for step in range(random.choice(STEPS)):
            sink(_progress(step))
            time.sleep(STEP_S)
    except Exception as error:
        tell(REFUSED, job=request.job_id)
        raise TrainingFailed(str(error)) from error
    tell(TRAINED, job=request.job_id)
    return trained(request, sink)


def _progress(step: int) -> Progress:
    return Progress(
        epoch=1,
        max_epochs=1,
        step=step,
        loss=0.0,
        edits_done=0,
        edits_total=1,
        seconds_elapsed=0.0,
        seconds_left=0.0,
    )


def settings(data_dir: Path) -> Settings:
    return Settings(
        data_dir=data_dir,
        stage_timeout_s=5.0,
        lease_s=60.0,
        job_after_edits=4,
        job_after_s=0.5,
        recheck=5,
        gate_edits=2,
        _env_file=None,
    )


async def run(url: str, data_dir: Path) -> None:
    """Leads, or waits to, for as long as there is somebody to tell."""
    log = logging.getLogger("service.coordinator.deployment")
    log.setLevel(logging.INFO)
    log.addHandler(Teller())
    # Nobody reads it, and what is expected here is said in great numbers.
    log.propagate = False
    database, parent = Database(url), os.getppid()
    async with coordinating(database, url, settings(data_dir), train, Knowing()) as coordinator:
        while os.getppid() == parent:
            await asyncio.sleep(1)
            await coordinator.check_health()


def main(url: str, data_dir: Path) -> None:
    logging.basicConfig(level=logging.CRITICAL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while name := sys.stdin.readline().strip():
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            tell(STARTED, name=name)
            named = "&" if "?" in url else "?"
            asyncio.run(run(f"{url}{named}application_name={name}", data_dir))
            return


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
