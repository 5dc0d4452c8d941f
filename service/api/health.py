"""/healthz and /readyz: whether the process lives, and whether queries can be answered."""

from fastapi import APIRouter

from service.api.dependencies import AdmissionDep, DatabaseDep, SettingsDep
from service.errors import Unavailable
from service.store import replicas, serving
from service.versions import BASE_VERSION

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def alive() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def ready(
    database: DatabaseDep, settings: SettingsDep, admission: AdmissionDep
) -> dict[str, str]:
    """A live replica holds the committed version; else 503.

    A service that may go without replicas is ready without: a query wakes one. So is one whose
    database is away after it was reached: queries go on.
    """
    try:
        async with database.transaction() as conn:
            version_id = (await serving.current(conn)).version_id
            live = await replicas.live(conn, settings.lease_s)
    except Unavailable:
        if not admission.informed:
            raise
        return {"status": "ready", "database": "away"}
    if not live and settings.replica_range[0] == 0:
        return {"status": "ready"}
    for replica in live:
        # An acknowledgement may be newer than the last heartbeat.
        acknowledged = {staged.version_id for staged in replica.staged if staged.digest}
        if version_id in {BASE_VERSION, *replica.resident, *acknowledged}:
            return {"status": "ready"}
    raise Unavailable(f"no live replica holds {version_id} yet")
