"""Asks a version about its edits, through the replicas that will serve it, and judges."""

import asyncio
from collections.abc import Mapping, Sequence

from service.inference import CompletionRequest, Inference
from workers import evaluation
from workers.contract import EditRecord
from workers.evaluation import Verdict

CONCURRENCY = 64

Question = tuple[str, tuple[str, ...]]
"""A prompt, and where its answer stops."""


async def examine(
    inference: Inference, version_id: str, parent_id: str, edits: Sequence[EditRecord]
) -> tuple[Sequence[Verdict], dict[str, float]]:
    """A verdict per edit, and reliability, generalization and locality in percent.

    Greedy and autoregressive. Locality prompts without a stated answer are asked of the parent too.
    """
    asked = [(p, evaluation.stop_of(edit)) for edit in edits for p in evaluation.prompts_of(edit)]
    kept = [(p, evaluation.STOP) for edit in edits for p in evaluation.parent_prompts_of(edit)]
    after = await _answers(inference, version_id, asked)
    before = await _answers(inference, parent_id, kept)
    verdicts = evaluation.judge(edits, after, before)
    return verdicts, evaluation.aggregate(verdicts)


async def _answers(
    inference: Inference, version_id: str, questions: Sequence[Question]
) -> Mapping[str, str]:
    """The text that `version_id` generates for each prompt."""
    places = asyncio.Semaphore(CONCURRENCY)

    async def ask(prompt: str, stop: tuple[str, ...]) -> tuple[str, str]:
        request = CompletionRequest(
            version_id, prompt, evaluation.MAX_NEW_TOKENS, temperature=0.0, stop=stop
        )
        async with places:
            return prompt, (await inference.complete(request)).text

    return dict(await asyncio.gather(*(ask(*question) for question in dict.fromkeys(questions))))
