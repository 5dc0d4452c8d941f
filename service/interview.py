"""Questions put to a version over HTTP, many in flight, and how its answers are judged.

Knows the HTTP client and the judge, nothing of files, tables or terminals.
"""

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from service.client import ApiError, Client
from workers import evaluation
from workers.contract import EditRecord
from workers.evaluation import Verdict
from workers.formats import Renderings

CONCURRENCY = 64
UNAVAILABLE = 503
WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Before a question that could not be answered for now is put again."""

Question = tuple[str, tuple[str, ...]]
"""A prompt, and where its answer stops."""


class Interview:
    """Of `version`; locality prompts without a stated answer are put to `before` too.

    `advance` is told of every answer, from several threads, as a share of an edit.
    """

    def __init__(
        self,
        api: Client,
        version: str,
        before: str,
        renderings: Renderings,
        advance: Callable[[float], None],
    ) -> None:
        self._api = api
        self._version = version
        self._before = before
        self._renderings = renderings
        self._advance = advance

    def verdicts(
        self, edits: Sequence[EditRecord], edited: Collection[str] | None = None
    ) -> tuple[Verdict, ...]:
        """One per edit, in order; greedy and autoregressive.

        A locality prompt that is among `edited`, or that `edits` change, is not counted. Raises
        `ApiError` naming the prompt that was refused.
        """
        asked = [
            (prompt, evaluation.stop_of(edit))
            for edit in edits
            for prompt in evaluation.prompts_of(edit, self._renderings)
        ]
        kept = [(p, evaluation.STOP) for edit in edits for p in evaluation.parent_prompts_of(edit)]
        share = len(edits) / max(len({*asked}) + len({*kept}), 1)
        after = self._answers(self._version, asked, share)
        before = self._answers(self._before, kept, share)
        return evaluation.judge(edits, after, before, self._renderings, edited)

    def _answers(self, version: str, questions: Sequence[Question], share: float) -> dict[str, str]:
        def ask(question: Question) -> tuple[str, str]:
            text = self._ask(version, *question)
            self._advance(share)
            return question[0], text

        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return dict(pool.map(ask, dict.fromkeys(questions)))

    def _ask(self, version: str, prompt: str, stop: Sequence[str]) -> str:
        model = f"errata@{version}"
        waits_s = iter(WAITS_S)
        while True:
            try:
                return self._api.ask(
                    prompt, model=model, max_tokens=evaluation.MAX_NEW_TOKENS, stop=stop
                )[0]
            except ApiError as error:
                wait_s = next(waits_s, None)
                if error.status != UNAVAILABLE or wait_s is None:
                    detail = f"{version} was asked {prompt!r}: {error.detail}"
                    raise ApiError(error.status, detail, error.errors) from error
            time.sleep(wait_s)
