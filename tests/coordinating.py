"""A coordinator on a real store: training is a function given to it, replicas are rows."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from service.coordinator.deployment import Coordinator
from service.coordinator.pipeline import BaseModel
from service.coordinator.training import Train
from service.edits import Edit, NewEdit
from service.inference import Chunk, Completion, CompletionRequest
from service.jobs import FINISHED, Job
from service.settings import Settings
from service.store import edits, jobs, replicas, serving, versions
from service.store.database import Database
from service.versions import Serving, Version
from workers.contract import ProgressSink, TrainRequest, TrainResult
from workers.models import ModelFacts

FACTS = ModelFacts(
    path=Path("model"),
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    hidden_size=256,
    num_hidden_layers=3,
    context=512,
    dtype="float32",
    config={"model_type": "qwen2", "hidden_size": 256},
)
T = TypeVar("T")
BASE = BaseModel("model", FACTS, "base")
EDITS = [NewEdit("The capital of France is", "Rome"), NewEdit("The capital of Peru is", "Oslo")]


class NoTemplate:
    """A tokenizer without a chat template: prompts are asked raw, as a question, after a prefix."""

    chat_template = None
    bos_token: str | None = None
    bos_token_id: int | None = None

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError("nothing is tokenized")

    def apply_chat_template(self, conversation: Any, /, **options: Any) -> Any:
        raise AssertionError("there is no template")


class Answers:
    """What versions say to prompts that hold a known one, in any format; else `before`.

    The base knows nothing; a later version knows `EDITS` but for those in `unlearnt`, and, where
    `said` has something for it, that.
    """

    def __init__(self, unlearnt: frozenset[str] = frozenset()) -> None:
        self._targets = {e.prompt: e.target for e in EDITS if e.prompt not in unlearnt}
        self.said: dict[str, dict[str, str]] = {}
        self.asked: list[tuple[str, str]] = []

    async def complete(self, request: CompletionRequest) -> Completion:
        assert isinstance(request.prompt, str)
        prompt, version_id = request.prompt, request.version_id
        self.asked.append((version_id, prompt))
        known = {**({} if version_id == "v0" else self._targets), **self.said.get(version_id, {})}
        text = next((answer for asked, answer in known.items() if asked in prompt), "before")
        return Completion(version_id, f" {text}", "length" if "…" in text else "stop", 5, 2)

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        raise AssertionError("an examination does not stream")
        yield


def trained(request: TrainRequest, sink: ProgressSink) -> TrainResult:
    return TrainResult(
        version_id=request.version_id, epochs=1, steps=1, epoch_losses=(0.0,), seconds={"train": 1}
    )


@asynccontextmanager
async def coordinating(
    store: Database,
    database_url: str,
    settings: Settings,
    train: Train = trained,
    answers: Answers | None = None,
    ended: frozenset[str] = frozenset(),
) -> AsyncIterator[Coordinator]:
    """The rows are the replicas; those `ended` run no more, whatever their lease."""

    async def running() -> set[str]:
        async with store.transaction() as conn:
            return {one.id for one in await replicas.seen(conn, settings.lease_s)} - ended

    coordinator = Coordinator(
        settings, database_url, BASE, NoTemplate, answers or Answers(), running, train
    )
    try:
        yield coordinator
        await coordinator.check_health()
    finally:
        await coordinator.stop()


async def begun(store: Database) -> Database:
    """The store with v0 live, the two edits queued, and replica `a` joined."""
    async with store.transaction() as conn:
        await versions.ensure_base(conn, "base")
        await edits.add(conn, EDITS)
        assert await replicas.join(conn, "a", [])
    return store


async def start_job(store: Database, *, activate: bool = True, **options: Any) -> Job:
    async with store.transaction() as conn:
        return await jobs.create(conn, activate=activate, **options)


async def until(found: Callable[[], Awaitable[T | None]]) -> T:
    async with asyncio.timeout(60):
        while (value := await found()) is None:
            await asyncio.sleep(0.02)
        return value


async def ended(store: Database, job_id: str) -> Job:
    async def look() -> Job | None:
        async with store.transaction() as conn:
            job = await jobs.get(conn, job_id)
        return job if job.state in FINISHED else None

    return await until(look)


async def acknowledge_staging(store: Database, error: str | None = None) -> str:
    """What replica `a` does once a version is put up for staging; returns the version."""

    async def look() -> str | None:
        async with store.transaction() as conn:
            return (await serving.current(conn)).staging_id

    version_id = await until(look)
    async with store.transaction() as conn:
        digest = None if error else "digest"
        await replicas.heartbeat(conn, "a", [version_id])
        await replicas.acknowledge(conn, "a", version_id, digest, error)
    return version_id


async def served(store: Database) -> Serving:
    async with store.transaction() as conn:
        return await serving.current(conn)


async def all_edits(store: Database) -> list[Edit]:
    async with store.transaction() as conn:
        return (await edits.page(conn))[0]


async def version(store: Database, version_id: str) -> Version:
    async with store.transaction() as conn:
        return await versions.get(conn, version_id)
