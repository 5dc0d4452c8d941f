"""A coordinator as a process of its own, to be killed: `python -m tests.faults.leader URL DIR`.

It says `asked` once the gate has asked a version, and then waits for the answer for ever, unless
`talks` is given.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.inference import Completion, CompletionRequest
from service.settings import Settings
from service.store.database import Database
from tests.coordinating import Answers, coordinating


class Speechless(Answers):
    async def complete(self, request: CompletionRequest) -> Completion:
        print("asked", flush=True)
        await asyncio.Event().wait()
        return await super().complete(request)


def settings(data_dir: Path) -> Settings:
    return Settings(
        data_dir=data_dir, stage_timeout_s=5.0, lease_s=60.0, job_after_s=1800.0, _env_file=None
    )


async def lead(url: str, data_dir: Path, talks: bool) -> None:
    database = Database(url)
    answers = Answers() if talks else Speechless()
    async with coordinating(database, url, settings(data_dir), answers=answers):
        await asyncio.Event().wait()


@contextmanager
def leading(
    url: str, data_dir: Path, *, skew_s: float = 0, talks: bool = False
) -> Iterator["subprocess.Popen[str]"]:
    """The process, its clock off by `skew_s`; killed at the end of the block, if not before."""
    module = ["tests.faults.skew", str(skew_s), "tests.faults.leader"]
    arguments = [url, str(data_dir), *(["talks"] if talks else [])]
    with subprocess.Popen(
        [sys.executable, "-m", *module, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(lead(sys.argv[1], Path(sys.argv[2]), "talks" in sys.argv[3:]))
