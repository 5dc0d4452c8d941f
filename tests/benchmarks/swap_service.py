"""The service that the swap benchmark swaps versions in: three of them, made by real jobs.

The model is a copy of the demo's. After the jobs the service is started anew on a copy that does
not end its answers at the end-of-sequence token (its weights, and so its fingerprint, stay): the
demo's answers are a word long, and streams must be in flight when a version is committed.
"""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import psycopg

from service import display
from service.client import read_jsonl
from service.settings import DEMO_MODEL
from service.store import serving
from service.store.embedded import EmbeddedPostgres
from service.versions import Committed
from tests.benchmarks.swap_streams import CLIENTS, MAX_TOKENS, completion
from tests.service_process import ServiceProcess, command_line

VERSIONS = ("v0", "v1", "v2")
EDITS = 20
"""So many for each version after the base."""
HPARAMS = {"formats": ["raw"], "batch_size": 4}
REPLICAS = 2
KV_TOKENS = 8192
"""Of each replica."""

Answers = dict[str, dict[str, str]]
"""By version, by prompt."""


@dataclass
class Running:
    """A started service, and where its parts are."""

    process: ServiceProcess
    database_url: str
    store: Path
    model: Path

    @property
    def completions(self) -> str:
        return f"{self.process.client.url}/v1/completions"

    def replicas(self) -> list[psutil.Process]:
        title = "ServeReplica:errata:Replica"
        processes = self.process.processes()
        return [p for p in processes if title in "".join(command_line(p)[:1])]

    def activate(self, version: str) -> None:
        self.process.client.post(f"/versions/{version}/activate", {})
        display.await_rollout(self.process.client, version)


@contextmanager
def three_versions(folder: Path) -> Iterator[Running]:
    """The service with the base committed, v1 and v2 made before it was last started."""
    model = folder / "model"
    shutil.copytree(DEMO_MODEL, model)
    server = EmbeddedPostgres(folder / "database")
    try:
        database_url = server.start()
        with started(folder, database_url) as running:
            make_versions(running)
        endless(model)
        with started(folder, database_url) as running:
            yield running
    finally:
        server.stop()


@contextmanager
def started(folder: Path, database_url: str) -> Iterator[Running]:
    data_dir, model = folder / "data", folder / "model"
    process = ServiceProcess(
        data_dir,
        ERRATA_MODEL=str(model),
        ERRATA_DATABASE_URL=database_url,
        ERRATA_REPLICAS=str(REPLICAS),
        ERRATA_API_REPLICAS=str(REPLICAS),
        ERRATA_KV_TOKENS=str(KV_TOKENS),
    )
    try:
        yield Running(process, database_url, data_dir / "store", model)
    finally:
        process.stop()


def make_versions(running: Running) -> None:
    """v1 and v2, of twenty edits more each; then the base is live again."""
    client = running.process.client
    edits = read_jsonl(DEMO_MODEL.parent / "edits.jsonl")
    for number, version in enumerate(VERSIONS[1:]):
        client.submit(edits[number * EDITS :][:EDITS])
        job = client.post("/jobs", {"kind": "extend", "hparams": HPARAMS})
        ended = display.watch(client, job["id"], quiet=True)
        if (ended["state"], ended["version"]) != ("done", version):
            raise RuntimeError(f"the job for {version} {ended['state']}: {ended['error']}")
    running.activate(VERSIONS[0])


def endless(model: Path) -> None:
    """No token ends an answer any more."""
    file = model / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))


def kv_bytes(model: Path) -> int:
    """Of a replica's KV cache: keys and values of float32 in every layer."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_key_value_heads"] / config["num_attention_heads"]
    per_token = 2 * 4 * config["num_hidden_layers"] * config["hidden_size"] * heads
    return int(KV_TOKENS * per_token)


def candidates(each: int = 10) -> list[str]:
    """Prompts that v1 was edited for, that v2 was, and of unedited facts."""
    edits = read_jsonl(DEMO_MODEL.parent / "edits.jsonl")
    unedited = read_jsonl(DEMO_MODEL.parent / "unedited.jsonl")
    chosen = [*edits[:each], *edits[EDITS:][:each], *unedited[:each]]
    return [fact["prompt"] for fact in chosen]


async def ask_all(url: str, prompts: Sequence[str], versions: Sequence[str]) -> Answers:
    """Every version's greedy answer to every prompt, a few asked at once."""
    answers: Answers = {version: {} for version in versions}
    waiting = iter([(version, prompt) for prompt in prompts for version in versions])

    async def work(http: httpx.AsyncClient) -> None:
        for version, prompt in waiting:
            body = completion(prompt, f"errata@{version}", max_tokens=MAX_TOKENS)
            response = await http.post(url, json=body)
            response.raise_for_status()
            answers[version][prompt] = response.json()["choices"][0]["text"]

    async with httpx.AsyncClient(timeout=120.0) as http:
        await asyncio.gather(*(work(http) for _ in range(CLIENTS)))
    return answers


def usable(answers: Answers, again: Answers) -> list[str]:
    """The prompts that each version answers in its own way, and again so when asked again."""
    first, *others = answers
    return [
        prompt
        for prompt in answers[first]
        if all(answers[version][prompt] == again[version][prompt] for version in answers)
        and len({answers[version][prompt] for version in answers}) == 1 + len(others)
    ]


@dataclass(frozen=True)
class Notice:
    """When the database was heard to have committed what."""

    at: float
    committed: Committed


class Commits:
    """The commits since `heard`, which listens to what the database announces."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self._news = asyncio.Condition()

    async def reached(self, generation: int) -> Notice:
        """The notice of this generation."""
        async with self._news:
            await self._news.wait_for(lambda: self._of(generation))
        return self._of(generation)[0]

    def _of(self, generation: int) -> list[Notice]:
        return [notice for notice in self.notices if notice.committed.generation == generation]

    async def follow(self, connection: psycopg.AsyncConnection) -> None:
        async for notification in connection.notifies():
            notice = Notice(time.perf_counter(), serving.announced(notification.payload))
            async with self._news:
                self.notices.append(notice)
                self._news.notify_all()


@asynccontextmanager
async def heard(database_url: str) -> AsyncIterator[Commits]:
    commits = Commits()
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(f"LISTEN {serving.CHANNEL}")
        following = asyncio.create_task(commits.follow(connection))
        try:
            yield commits
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
