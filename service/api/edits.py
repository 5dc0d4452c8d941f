"""/edits: store them, find them, look at one."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import AfterValidator

from service.api.dependencies import (
    Cursor,
    DatabaseDep,
    IdempotencyKey,
    IdInPath,
    IdInQuery,
    Limit,
)
from service.api.idempotency import answer_once
from service.api.schemas import (
    EditEventOut,
    EditOut,
    EditPage,
    EditsIn,
    EditWithHistory,
    StoredEdits,
    VerdictOut,
    storable,
)
from service.edits import EditState
from service.store import edits, versions

router = APIRouter(prefix="/edits", tags=["edits"])

SearchText = Annotated[str | None, Query(min_length=1, max_length=256), AfterValidator(storable)]


@router.post("", status_code=202, response_model=StoredEdits, response_model_exclude_none=True)
async def submit(
    body: EditsIn, request: Request, database: DatabaseDep, idempotency_key: IdempotencyKey = None
) -> dict[str, Any]:
    """Stores edits for the next job; acknowledged once they are on disk."""
    async with database.transaction() as conn:

        async def store() -> dict[str, Any]:
            stored = await edits.add(conn, [edit.record() for edit in body.edits])
            return StoredEdits.of(stored).model_dump(mode="json")

        return await answer_once(conn, request, idempotency_key, store)


@router.get("")
async def find(
    database: DatabaseDep,
    state: EditState | None = None,
    version: IdInQuery = None,
    job: IdInQuery = None,
    q: SearchText = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> EditPage:
    """Edits, newest first; `version` selects what it holds, `q` a text in them."""
    async with database.transaction() as conn:
        found, next_cursor = await edits.page(
            conn, state=state, version_id=version, job_id=job, q=q, limit=limit, cursor=cursor
        )
    return EditPage(edits=[EditOut.of(edit) for edit in found], next_cursor=next_cursor)


@router.get("/{edit_id}")
async def show(edit_id: IdInPath, database: DatabaseDep) -> EditWithHistory:
    """One edit, with everything that happened to it and how it came out last."""
    async with database.transaction() as conn:
        edit = await edits.get(conn, edit_id)
        events = await edits.history(conn, edit_id)
        latest = await versions.latest_verdict(conn, edit_id)
    return EditWithHistory.of(
        edit,
        history=[EditEventOut.of(event) for event in events],
        verdict=None if latest is None else VerdictOut.of(*latest),
    )
