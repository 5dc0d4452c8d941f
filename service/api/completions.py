"""`/v1/completions` and `/v1/models`: OpenAI's protocol over the replicas.

One request is answered by the one version it was admitted for, all its choices included.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse

from service.api.admission import Admitted
from service.api.dependencies import AdmissionDep, DatabaseDep, InferenceDep, SettingsDep
from service.api.openai import (
    Choice,
    CompletionAnswer,
    CompletionBody,
    Logprobs,
    ModelCard,
    ModelList,
    Usage,
)
from service.errors import ErrataError, FieldError, InvalidInput
from service.inference import Chunk, Completion, CompletionRequest, Inference
from service.store import versions
from service.versions import BASE_VERSION, VersionState

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1", tags=["completions"])

SEEDS = 2**63
MinGeneration = Annotated[int, Header(ge=0, lt=2**63)]
Session = Annotated[str | None, Header(min_length=1, max_length=255)]


@router.post("/completions", response_model=CompletionAnswer)
async def complete(
    body: CompletionBody,
    response: Response,
    settings: SettingsDep,
    admission: AdmissionDep,
    inference: InferenceDep,
    x_errata_min_generation: MinGeneration = 0,
    x_errata_session: Session = None,
) -> CompletionAnswer | StreamingResponse:
    """Completes prompts with the committed version, or with the one that `model` names.

    While there is a canary, queries of one `user`, or of one X-Errata-Session, are all answered by
    the same version. X-Errata-Min-Generation: the answer is of that generation or a later one.
    """
    if misfit := body.misfit(settings.max_new_tokens):
        raise InvalidInput(" ".join(misfit), (FieldError(*misfit),))
    sticky = x_errata_session if body.user is None else body.user
    answer = Answer(
        body, await admission.resolve(body.model, sticky=sticky, at_least=x_errata_min_generation)
    )
    if body.stream:
        return await answer.streamed(inference)
    response.headers.update(answer.headers)
    return await answer.whole(inference)


@router.get("/models")
async def models(database: DatabaseDep, settings: SettingsDep) -> ModelList:
    """`errata` (the committed version), `errata@base`, and the versions that can be asked."""
    async with database.transaction() as conn:
        found, _ = await versions.page(conn, limit=1000)
    usable = [version for version in found if version.state is not VersionState.REJECTED]
    newest = max((int(version.created_at.timestamp()) for version in usable), default=0)
    named = [
        ModelCard(
            id="errata@base" if version.id == BASE_VERSION else f"errata@{version.id}",
            created=int(version.created_at.timestamp()),
            root=settings.model_path,
        )
        for version in usable
    ]
    return ModelList(
        data=[ModelCard(id="errata", created=newest, root=settings.model_path), *named]
    )


class WrongVersion(RuntimeError):
    """A replica answered with another version than it was asked for: never shown as an answer."""


class Answer:
    """The answer to one HTTP request, whole or in pieces."""

    def __init__(self, body: CompletionBody, admitted: Admitted) -> None:
        self._body = body
        self._version_id = admitted.version_id
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self.headers = {
            "X-Errata-Version": admitted.version_id,
            "X-Errata-Generation": str(admitted.generation),
        }

    async def whole(self, inference: Inference) -> CompletionAnswer:
        tasks = [
            asyncio.create_task(self._checked(inference.complete(request)))
            for request in self._requests()
        ]
        try:
            completions = await asyncio.gather(*tasks)
        finally:
            await _end(tasks)
        choices = [
            Choice(
                index=index,
                text=completion.text,
                logprobs=Logprobs.of(completion.scores) if self._body.echo else None,
                finish_reason=completion.finish_reason,
            )
            for index, completion in enumerate(completions)
        ]
        return self._part(choices, self._usage(completions))

    async def streamed(self, inference: Inference) -> StreamingResponse:
        """Begins once the first piece is there: what fails before it gets its own status."""
        pieces = self._pieces(inference)
        first = await anext(pieces)
        return StreamingResponse(
            self._events(first, pieces), media_type="text/event-stream", headers=self.headers
        )

    def _requests(self) -> list[CompletionRequest]:
        """One for each choice, prompts first: choices of one prompt are neighbours."""
        body = self._body
        return [
            CompletionRequest(
                version_id=self._version_id,
                prompt=prompt,
                max_tokens=body.max_tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                seed=None if body.seed is None else (body.seed + choice) % SEEDS,
                stop=body.stops(),
                prompt_logprobs=body.logprobs,
            )
            for prompt in body.prompts()
            for choice in range(body.n)
        ]

    async def _checked(self, answer: Any) -> Completion:
        completion: Completion = await answer
        self._require_version(completion.version_id)
        return completion

    async def _pieces(self, inference: Inference) -> AsyncGenerator[tuple[int, Chunk]]:
        """The chunks of all choices as they come, with the index of the choice."""
        arrived: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue()

        async def follow(index: int, request: CompletionRequest) -> None:
            try:
                async for chunk in inference.stream(request):
                    self._require_version(chunk.version_id)
                    arrived.put_nowait((index, chunk))
                arrived.put_nowait(None)
            except Exception as error:
                arrived.put_nowait(error)

        requests = self._requests()
        tasks = [asyncio.create_task(follow(*numbered)) for numbered in enumerate(requests)]
        open_choices = len(tasks)
        try:
            while open_choices:
                piece = await arrived.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    open_choices -= 1
                else:
                    yield piece
        finally:
            await _end(tasks)

    async def _events(
        self, first: tuple[int, Chunk], rest: AsyncIterator[tuple[int, Chunk]]
    ) -> AsyncIterator[str]:
        last: list[Chunk] = []
        try:
            async for index, chunk in _chain(first, rest):
                if chunk.finish_reason is not None:
                    last.append(chunk)
                if chunk.text or chunk.finish_reason is not None:
                    choice = Choice(index=index, text=chunk.text, finish_reason=chunk.finish_reason)
                    yield self._event(self._part([choice], None))
        except ErrataError as error:
            log.warning("a stream ended early: %s", error)
            yield _event({"error": {"message": error.detail, "type": type(error).__name__}})
            return
        if self._body.stream_options.include_usage:
            yield self._event(self._part([], self._usage(last)))
        yield "data: [DONE]\n\n"

    def _require_version(self, version_id: str) -> None:
        if version_id != self._version_id:
            raise WrongVersion(f"asked for {self._version_id}, answered by {version_id}")

    def _part(self, choices: list[Choice], usage: Usage | None) -> CompletionAnswer:
        return CompletionAnswer(
            id=self._id,
            created=self._created,
            model=f"errata@{self._version_id}",
            system_fingerprint=f"errata-{self._version_id}",
            choices=choices,
            usage=usage,
        )

    def _event(self, part: CompletionAnswer) -> str:
        """`usage` is there, if only as null, where it was asked for."""
        hidden = set() if self._body.stream_options.include_usage else {"usage"}
        return _event(part.model_dump(mode="json", exclude=hidden))

    def _usage(self, ends: list[Completion] | list[Chunk]) -> Usage:
        """A prompt counts once, however many choices it has."""
        prompt_tokens = sum(end.prompt_tokens for end in ends) // self._body.n
        completion_tokens = sum(end.completion_tokens for end in ends)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _chain(
    first: tuple[int, Chunk], rest: AsyncIterator[tuple[int, Chunk]]
) -> AsyncIterator[tuple[int, Chunk]]:
    yield first
    async for piece in rest:
        yield piece


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    """Give up what is still running, and wait until it has let go."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
