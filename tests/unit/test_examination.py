"""How versions are asked: each prompt once, a bounded number at a time."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from service.coordinator.examination import CONCURRENCY, ask, examine
from service.errors import InvalidInput, Unavailable
from service.inference import Chunk, Completion, CompletionRequest
from workers.contract import EditRecord, LocalityProbe
from workers.formats import RAW

pytestmark = pytest.mark.anyio


class Replicas:
    """Says the version's id after every prompt; some prompts are too long, and one is refused."""

    def __init__(self) -> None:
        self.asked: list[CompletionRequest] = []
        self.at_once = self.most_at_once = 0

    async def complete(self, request: CompletionRequest) -> Completion:
        self.asked.append(request)
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        if request.prompt == "away":
            raise Unavailable("no replica")
        if request.prompt == "long":
            raise InvalidInput("prompt has 600 tokens")
        return Completion(request.version_id, f" {request.version_id}\0", "stop", 1, 1)

    async def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        raise AssertionError("an examination does not stream")
        yield


async def test_a_bounded_number_is_asked_at_once() -> None:
    replicas = Replicas()
    questions = {f"prompt {number}": (".",) for number in range(10 * CONCURRENCY)}
    answers = await ask(replicas, "v1", questions)
    assert set(answers) == set(questions)
    assert replicas.most_at_once == CONCURRENCY


async def test_an_error_ends_the_asking() -> None:
    replicas = Replicas()
    questions = dict.fromkeys(("away", *map(str, range(10 * CONCURRENCY))), (".",))
    with pytest.raises(Unavailable, match="no replica"):
        await ask(replicas, "v1", questions)
    await asyncio.sleep(0)
    assert len(replicas.asked) < 3 * CONCURRENCY


async def test_a_shared_prompt_is_asked_once_and_judged_for_each() -> None:
    replicas = Replicas()
    probe = LocalityProbe(prompt="shared", answer="v1")
    edits = [
        EditRecord(id="1", prompt="a", target="v1", rephrases=("long",), locality=(probe,)),
        EditRecord(id="2", prompt="b", target="J. Doe", locality=(probe,)),
    ]
    found = await examine(replicas, "v1", "v0", edits[:1], edits[1:], RAW)
    (one,), (other,) = found.verdicts, found.earlier
    assert (one.reliable, one.answer, one.generalization, one.locality) == (True, "v1", 0, 1)
    assert (other.reliable, other.locality) == (False, 1)
    stops = {str(request.prompt): request.stop for request in replicas.asked}
    assert stops == {"a": (".", "\n"), "long": (".", "\n"), "b": ("\n",), "shared": ("\n",)}
    assert len(replicas.asked) == 4
