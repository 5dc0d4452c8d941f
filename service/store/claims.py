"""What a job does with edits: claim them, settle how they came out, or give them back.

A job's links (`job_edits`) stay for good; while a link is open no other job can have the edit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Text, delete, exists, insert, literal, not_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.edits import EditState
from service.errors import Conflict
from service.jobs import Job, JobKind
from service.store import versions
from service.store.edit_states import among, give_back, lock_facts, move, note
from service.store.tables import edits, job_edits, jobs, version_edits
from service.versions import Verdict


async def claim(conn: AsyncConnection, job: Job) -> int:
    """Give `job` the queued edits it asks for, oldest first; how many edits it then has.

    A rebuild also gets every applied edit, which stays applied, but for those whose fact it
    trains anew. Edits that another transaction holds are passed over.
    """
    query = select(edits.c.id).where(edits.c.state == EditState.QUEUED).order_by(edits.c.id)
    if job.edit_ids is not None:
        query = query.where(among(edits.c.id, job.edit_ids))
    found = await conn.execute(query.limit(job.max_edits).with_for_update(skip_locked=True))
    ids = list(found.scalars())
    await move(conn, EditState.QUEUED, EditState.CLAIMED, among(edits.c.id, ids), job_id=job.id)
    if ids:
        await conn.execute(
            insert(job_edits), [{"job_id": job.id, "edit_id": edit_id} for edit_id in ids]
        )
    total = len(ids)
    if job.kind is JobKind.REBUILD:
        total += await _keep_applied(conn, job.id)
    return total


async def settle(
    conn: AsyncConnection, job_id: str, version_id: str, verdicts: Sequence[Verdict]
) -> None:
    """Record how each edit of the job came out in `version_id`: one verdict for every edit.

    Claimed edits become applied or failed; applied ones supersede what was applied of the same
    fact. Kept edits stay applied, and move to the version if it holds them; the others are queued
    once it goes live (`earlier.give_back_lost`). The version is published before, in the same
    transaction.
    """
    links = await _locked_links(conn, job_id, open_only=True)
    if not links:
        raise Conflict(f"job {job_id} has no open edits; it was settled or released before")
    if {link.edit_id for link in links} != {verdict.edit_id for verdict in verdicts}:
        raise Conflict(f"job {job_id}: the verdicts are not those of its {len(links)} open edits")
    kept = {link.edit_id for link in links if link.kept}
    held = [verdict.edit_id for verdict in verdicts if verdict.reliable]
    lost = [verdict.edit_id for verdict in verdicts if not verdict.reliable]
    applied = [edit_id for edit_id in held if edit_id not in kept]
    anew = set(applied)
    await _settle_claimed(conn, version_id, applied, [e for e in lost if e not in kept])
    await _settle_kept(
        conn, version_id, [e for e in held if e in kept], [e for e in lost if e in kept]
    )
    facts = [link.fact for link in links if link.edit_id in anew]
    await move(
        conn,
        EditState.APPLIED,
        EditState.SUPERSEDED,
        among(edits.c.fact, facts) & not_(among(edits.c.id, applied)),
        detail=f"a later edit of the same fact was applied in {version_id}",
    )
    await _drop_replaced(conn, version_id, facts)
    await versions.record_verdicts(conn, version_id, verdicts)
    await _close(conn, job_id)


async def release(conn: AsyncConnection, job_id: str, reason: str) -> int:
    """Give the job's edits back, those applied in its version too; how many are queued again.

    One whose fact has a later edit is superseded instead; one kept by a rebuild is applied in
    the version it was in before. Does nothing the second time.
    """
    await _locked_links(conn, job_id, open_only=False)
    version_id = select(jobs.c.version_id).where(jobs.c.id == job_id).scalar_subquery()
    mine, detail = edits.c.job_id == job_id, f"given back by {job_id}: {reason}"
    queued = await give_back(conn, EditState.CLAIMED, mine, detail=detail)
    published = mine & (edits.c.version_id == version_id)
    queued += await give_back(conn, EditState.APPLIED, published, detail=detail)
    await _return_kept(conn, job_id, reason)
    await _close(conn, job_id)
    return queued


@dataclass(frozen=True)
class _Link:
    edit_id: str
    fact: bytes
    kept: bool


async def _locked_links(conn: AsyncConnection, job_id: str, *, open_only: bool) -> list[_Link]:
    """The job's edits; they, and what else speaks for their facts, are locked against changes."""
    mine, links = edits.alias(), job_edits.c
    facts = select(mine.c.fact).join(job_edits, links.edit_id == mine.c.id)
    await lock_facts(conn, facts.where(links.job_id == job_id))
    query = (
        select(edits.c.id, edits.c.fact, links.kept_from)
        .join(job_edits, links.edit_id == edits.c.id)
        .where(links.job_id == job_id)
    )
    found = await conn.execute(query.where(links.open) if open_only else query)
    return [_Link(row.id, row.fact, row.kept_from is not None) for row in found]


async def _keep_applied(conn: AsyncConnection, job_id: str) -> int:
    claimed = edits.alias()
    anew = exists().where(claimed.c.fact == edits.c.fact, claimed.c.job_id == job_id)
    applied = select(literal(job_id, Text), edits.c.id, edits.c.version_id)
    result = await conn.execute(
        insert(job_edits).from_select(
            ["job_id", "edit_id", "kept_from"],
            applied.where(edits.c.state == EditState.APPLIED, not_(anew)),
        )
    )
    return result.rowcount


async def _settle_claimed(
    conn: AsyncConnection, version_id: str, applied: list[str], failed: list[str]
) -> None:
    moved = 0
    for after, ids in ((EditState.APPLIED, applied), (EditState.FAILED, failed)):
        which = among(edits.c.id, ids)
        moved += await move(conn, EditState.CLAIMED, after, which, version_id=version_id)
    if moved != len(applied) + len(failed):
        raise Conflict(f"{version_id}: some of the job's edits are no longer claimed by it")


async def _settle_kept(
    conn: AsyncConnection, version_id: str, held: list[str], lost: list[str]
) -> None:
    detail = f"kept by the rebuild {version_id}"
    which = among(edits.c.id, held)
    await note(conn, EditState.APPLIED, which, detail=detail, version_id=version_id)
    detail = f"not reliable in the rebuild {version_id}"
    await note(conn, EditState.APPLIED, among(edits.c.id, lost), detail=detail)


async def _return_kept(conn: AsyncConnection, job_id: str, reason: str) -> None:
    """Put edits that a rebuild moved to its version back to the version they came from."""
    link = (job_edits.c.job_id == job_id) & (job_edits.c.edit_id == edits.c.id)
    version_id = select(jobs.c.version_id).where(jobs.c.id == job_id).scalar_subquery()
    await note(
        conn,
        EditState.APPLIED,
        (edits.c.version_id == version_id)
        & exists().where(link, job_edits.c.kept_from.is_not(None)),
        detail=f"{job_id} was given up: {reason}",
        version_id=select(job_edits.c.kept_from).where(link).scalar_subquery(),
    )


async def _close(conn: AsyncConnection, job_id: str) -> None:
    await conn.execute(update(job_edits).where(job_edits.c.job_id == job_id).values(open=False))


async def _drop_replaced(conn: AsyncConnection, version_id: str, facts: list[bytes]) -> None:
    """What the parent held of the newly applied `facts` is held no more."""
    replaced = select(edits.c.id).where(among(edits.c.fact, facts))
    mine = version_edits.c.version_id == version_id
    await conn.execute(delete(version_edits).where(mine, version_edits.c.edit_id.in_(replaced)))
