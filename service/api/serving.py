"""/serving: what is committed, what is being staged, and what each replica holds."""

from fastapi import APIRouter

from service.api.dependencies import DatabaseDep, SettingsDep
from service.api.schemas import ServingOut
from service.store import replicas, serving

router = APIRouter(tags=["serving"])


@router.get("/serving")
async def show(database: DatabaseDep, settings: SettingsDep) -> ServingOut:
    """The serving row and the replicas seen within the lease."""
    async with database.transaction() as conn:
        now = await serving.current(conn)
        present = await replicas.seen(conn, settings.lease_s)
    return ServingOut.of(now, present)
