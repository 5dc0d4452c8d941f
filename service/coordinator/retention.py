"""What a job trains along so that it stays: earlier edits, and unrelated answers as they are.

Decided once for a job, before it trains, and recorded: a run that is taken up again is the same.
"""

import asyncio
import logging
from collections.abc import Sequence

from service.coordinator import anchors
from service.coordinator.examination import ask
from service.edits import fact_key
from service.inference import Inference
from service.jobs import Job, Retention
from service.settings import Settings
from service.store import earlier, edits, retentions
from service.store.database import Database
from workers import evaluation
from workers.contract import Anchor, EditRecord, Hparams, LocalityProbe

log = logging.getLogger(__name__)


async def retained(
    database: Database,
    inference: Inference,
    settings: Settings,
    job: Job,
    hparams: Hparams,
    claimed: Sequence[EditRecord],
) -> Retention:
    """What `job`, which trains `claimed`, is to keep; the same whenever it is asked for.

    Raises `ConfigurationError` if prompts of the anchors file are wanted and it is unfit.
    """
    async with database.transaction() as conn:
        decided = await retentions.get(conn, job.id)
        if decided is not None:
            return decided
        rehearsed = await earlier.sample(conn, job, "rehearse", hparams.rehearsal)
    probes = await asyncio.to_thread(_probes, settings, job, hparams, claimed)
    async with database.transaction() as conn:
        changed = await edits.spoken_for(conn, {probe.prompt for probe in probes})
    changed |= {prompt for edit in claimed for prompt in edit.rephrases}
    wanted = _distinct(probes, {fact_key(prompt) for prompt in changed})
    assert job.parent_id is not None
    kept = await _answered(inference, job.parent_id, wanted)
    retention = Retention(tuple(edit.record() for edit in rehearsed), kept)
    async with database.transaction() as conn:
        await retentions.record(conn, job.id, retention)
        recorded = await retentions.get(conn, job.id)
    assert recorded is not None
    log.info("job %s: %d earlier edits and %d anchors", job.id, len(rehearsed), len(kept))
    return recorded


def _probes(
    settings: Settings, job: Job, hparams: Hparams, claimed: Sequence[EditRecord]
) -> list[LocalityProbe]:
    """The candidates; an edit's own come first."""
    probes: list[LocalityProbe] = []
    if hparams.anchor_locality:
        probes += [probe for edit in claimed for probe in edit.locality]
    if hparams.anchor_prompts:
        seed = f"{hparams.seed} {job.id}"
        probes += anchors.sample(settings.anchors, hparams.anchor_prompts, seed)
    return probes


def _distinct(probes: Sequence[LocalityProbe], changed: set[str]) -> list[LocalityProbe]:
    """The first of each prompt, but for the facts in `changed`."""
    first: dict[str, LocalityProbe] = {}
    for probe in probes:
        first.setdefault(fact_key(probe.prompt), probe)
    return [probe for key, probe in first.items() if key not in changed]


async def _answered(
    inference: Inference, parent_id: str, probes: Sequence[LocalityProbe]
) -> tuple[Anchor, ...]:
    """Anchors with the stated answer, else the one that `parent_id` gives.

    Left out is what it answers with nothing, or does not come to an end with: there is no answer
    there to be kept.
    """
    unknown = {probe.prompt: evaluation.STOP for probe in probes if probe.answer is None}
    given = {
        prompt: evaluation.answer_of(answer.text).replace("\0", "")
        for prompt, answer in (await ask(inference, parent_id, unknown)).items()
        if answer is not None and answer.finish_reason == "stop"
    }
    found = ((probe.prompt, probe.answer or given.get(probe.prompt, "")) for probe in probes)
    return tuple(Anchor(prompt=p, answer=answer) for p, answer in found if answer.strip())
