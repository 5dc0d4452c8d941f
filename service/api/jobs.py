"""/jobs: start one, look at them."""

from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.dependencies import (
    Cursor,
    DatabaseDep,
    IdempotencyKey,
    IdInPath,
    Limit,
    SettingsDep,
)
from service.api.idempotency import answer_once
from service.api.schemas import JobIn, JobOut, JobPage
from service.jobs import JobState
from service.store import jobs

router = APIRouter(prefix="/jobs", tags=["jobs"])


@router.post("", status_code=202, response_model=JobOut)
async def start(
    body: JobIn,
    request: Request,
    response: Response,
    database: DatabaseDep,
    settings: SettingsDep,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Starts a job over the queued edits (or over all, for a rebuild)."""
    hparams = body.checked_hparams()
    async with database.transaction() as conn:

        async def create() -> dict[str, Any]:
            job = await jobs.create(
                conn,
                kind=body.kind,
                activate=body.activate,
                max_edits=body.max_edits,
                edit_ids=body.edit_ids,
                hparams=hparams,
                recheck=body.rechecked(settings.recheck),
            )
            return JobOut.of(job).model_dump(mode="json")

        answer = await answer_once(conn, request, idempotency_key, create)
    response.headers["Location"] = f"/jobs/{answer['id']}"
    return answer


@router.get("")
async def find(
    database: DatabaseDep,
    state: JobState | None = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> JobPage:
    """Jobs, newest first."""
    async with database.transaction() as conn:
        found, next_cursor = await jobs.page(conn, state=state, limit=limit, cursor=cursor)
    return JobPage(jobs=[JobOut.of(job) for job in found], next_cursor=next_cursor)


@router.get("/{job_id}")
async def show(job_id: IdInPath, database: DatabaseDep) -> JobOut:
    """One job: its state, its progress, its error."""
    async with database.transaction() as conn:
        return JobOut.of(await jobs.get(conn, job_id))
