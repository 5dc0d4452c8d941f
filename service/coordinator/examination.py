"""Asks versions about prompts and edits, through the replicas that will serve them, and judges."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.errors import InvalidInput
from service.inference import Completion, CompletionRequest, Inference
from workers import evaluation
from workers.contract import EditRecord
from workers.evaluation import Verdict
from workers.formats import Renderings

log = logging.getLogger(__name__)

CONCURRENCY = 64
EDITS_AT_ONCE = 1000
"""The answers of so many edits are kept until they are judged."""

Questions = Mapping[str, tuple[str, ...]]
"""Prompts, and where the answer to each stops."""


@dataclass(frozen=True)
class Examination:
    verdicts: Sequence[Verdict]
    """On the edits of the job."""
    earlier: Sequence[Verdict]
    """On the earlier edits that were asked again."""

    @property
    def metrics(self) -> dict[str, float]:
        """See `workers.evaluation.aggregate`."""
        return evaluation.aggregate(self.verdicts, self.earlier)


async def examine(
    inference: Inference,
    version_id: str,
    parent_id: str,
    edits: Sequence[EditRecord],
    earlier: Sequence[EditRecord],
    renderings: Renderings,
) -> Examination:
    """A verdict per edit, in order: greedy, autoregressive, in each of the prompt formats.

    Locality prompts without a stated answer are asked of the parent too.
    """
    everything = [*edits, *earlier]
    edited = evaluation.edited_prompts(everything)
    verdicts: list[Verdict] = []
    for start in range(0, len(everything), EDITS_AT_ONCE):
        some = everything[start : start + EDITS_AT_ONCE]
        after = await ask(inference, version_id, _questions(some, renderings))
        before = await ask(inference, parent_id, _parent_questions(some))
        verdicts += evaluation.judge(some, _texts(after), _texts(before), renderings, edited)
    return Examination(verdicts[: len(edits)], verdicts[len(edits) :])


async def ask(
    inference: Inference, version_id: str, questions: Questions
) -> dict[str, Completion | None]:
    """What `version_id` generates greedily for each prompt; None if it is too long to be asked."""
    answers: dict[str, Completion | None] = {}
    waiting = iter(questions.items())

    async def work() -> None:
        for prompt, stop in waiting:
            answers[prompt] = await _answer(inference, version_id, prompt, stop)

    workers = [asyncio.create_task(work()) for _ in range(min(CONCURRENCY, len(questions)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
    return answers


async def _answer(
    inference: Inference, version_id: str, prompt: str, stop: tuple[str, ...]
) -> Completion | None:
    request = CompletionRequest(
        version_id, prompt, evaluation.MAX_NEW_TOKENS, temperature=0.0, stop=stop
    )
    try:
        return await inference.complete(request)
    except InvalidInput as error:
        log.warning("the prompt %.60r cannot be asked: %s", prompt, error)
        return None


def _questions(edits: Sequence[EditRecord], renderings: Renderings) -> Questions:
    asked: dict[str, tuple[str, ...]] = {}
    for edit in edits:
        stop = evaluation.stop_of(edit)
        for prompt in evaluation.prompts_of(edit, renderings):
            # The longer answer serves both: it is cut again where each edit's own ends.
            asked[prompt] = min(asked.get(prompt, stop), stop, key=len)
    return asked


def _parent_questions(edits: Sequence[EditRecord]) -> Questions:
    prompts = (prompt for edit in edits for prompt in evaluation.parent_prompts_of(edit))
    return dict.fromkeys(prompts, evaluation.STOP)


def _texts(answers: Mapping[str, Completion | None]) -> dict[str, str]:
    """What was said; PostgreSQL keeps no NUL characters."""
    return {
        prompt: answer.text.replace("\0", "") if answer else ""
        for prompt, answer in answers.items()
    }
