"""/versions: what exists, how its edits came out; roll forward or back."""

from fastapi import APIRouter

from service.api.dependencies import Cursor, DatabaseDep, IdInPath, Limit, SettingsDep
from service.api.schemas import (
    ActivateBody,
    ServingOut,
    VerdictOut,
    VersionOut,
    VersionPage,
    VersionWithVerdicts,
)
from service.store import replicas, serving, versions
from service.versions import VersionState

router = APIRouter(prefix="/versions", tags=["versions"])


@router.get("")
async def find(
    database: DatabaseDep,
    state: VersionState | None = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> VersionPage:
    """Versions, newest first."""
    async with database.transaction() as conn:
        found, next_cursor = await versions.page(conn, state=state, limit=limit, cursor=cursor)
    listed = [VersionOut.of(version) for version in found]
    return VersionPage(versions=listed, next_cursor=next_cursor)


@router.get("/{version_id}")
async def show(
    version_id: IdInPath, database: DatabaseDep, limit: Limit = 100, cursor: Cursor = None
) -> VersionWithVerdicts:
    """One version, with a page of how its edits, and earlier ones asked again, came out.

    All that it holds: GET /edits?version=.
    """
    async with database.transaction() as conn:
        version = await versions.get(conn, version_id)
        found, next_cursor = await versions.verdicts(conn, version_id, limit=limit, cursor=cursor)
    verdicts = [VerdictOut.of(version_id, verdict) for verdict in found]
    return VersionWithVerdicts.of(version, verdicts=verdicts, next_cursor=next_cursor)


@router.post("/{version_id}/activate", status_code=202)
async def activate(
    version_id: IdInPath,
    database: DatabaseDep,
    settings: SettingsDep,
    body: ActivateBody = ActivateBody(),  # noqa: B008  frozen
) -> ServingOut:
    """Begins the rollout of a version, newer or older; GET /serving shows when it is committed.

    With `percent`, as a canary for that share of the queries; activated again without, it is
    promoted. Activating the live version rolls a canary back.
    """
    percent = None if body.percent == 100 else body.percent
    async with database.transaction() as conn:
        now = await serving.request(
            conn, version_id, percent=percent, promote_after_s=body.promote_after_s
        )
    # The rollout has begun: it does not wait for what is shown of it.
    async with database.transaction() as conn:
        present = await replicas.seen(conn, settings.lease_s)
    return ServingOut.of(now, present)
