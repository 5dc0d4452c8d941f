"""The gate before a commit: a staged version must answer as it did when it was made.

Asks through the replicas that will serve it. Decides nothing about rollouts.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.coordinator import prompt_files
from service.coordinator.examination import ask
from service.inference import Completion, Inference
from service.settings import Settings
from service.store import gates
from service.store.database import Database
from service.versions import BASE_VERSION, GateAnswer, GateFinding, Version
from workers import evaluation
from workers.contract import EditRecord, LocalityProbe

log = logging.getLogger(__name__)

SHOWN = 20
"""So many failures are kept as evidence."""
LINE = ("\n",)
"""Where an answer ends that is cut at a full stop only later, since it may have one within."""


class Gate:
    """Asks a version, and says whether it may serve."""

    def __init__(self, database: Database, inference: Inference, settings: Settings) -> None:
        self._database = database
        self._inference = inference
        self._settings = settings

    def concerns(self, version: Version) -> bool:
        """Whether a version has yet to pass: never asked, and never live."""
        asked = self._settings.gate_edits or self._settings.gate_prompts
        passed = version.activated_at is not None or (version.gate and version.gate.passed)
        return bool(asked and not passed and version.id != BASE_VERSION)

    async def ask(self, version_id: str, live_id: str) -> GateFinding:
        """Asks `version_id`, staged on the replicas, and keeps what was found.

        A sample of the edits that were reliable when it was evaluated, and the prompts whose
        answers no version may change: as their file states, or else as `live_id` answers now.
        Raises `ConfigurationError` if that file is unfit, `Unavailable` if no replica answers.
        """
        async with self._database.transaction() as conn:
            sampled = await gates.sample(conn, version_id, self._settings.gate_edits)
        probes = await asyncio.to_thread(_probes, self._settings.gate_prompts)
        edits = await self._edits(version_id, [edit.record() for edit in sampled])
        kept = await self._kept(version_id, live_id, probes)
        wrong = [answer for answer in edits if not _right(answer)]
        changed = [answer for answer in kept if not _right(answer)]
        needed = self._settings.gate_reliability * len(edits)
        found = GateFinding(
            passed=not changed and len(edits) - len(wrong) >= needed,
            edits_asked=len(edits),
            edits_reliable=len(edits) - len(wrong),
            prompts_asked=len(kept),
            prompts_unchanged=len(kept) - len(changed),
            failures=tuple([*changed, *wrong][:SHOWN]),
        )
        async with self._database.transaction() as conn:
            await gates.record(conn, version_id, found)
        log.info("gate of %s: %s", version_id, found)
        return found

    async def _edits(self, version_id: str, edits: Sequence[EditRecord]) -> list[GateAnswer]:
        questions = {edit.prompt: evaluation.stop_of(edit) for edit in edits}
        said = await ask(self._inference, version_id, questions)
        return [_answer(edit.prompt, edit.target, said) for edit in edits]

    async def _kept(
        self, version_id: str, live_id: str, probes: Sequence[LocalityProbe]
    ) -> list[GateAnswer]:
        unknown = [probe.prompt for probe in probes if probe.answer is None]
        before = await ask(self._inference, live_id, dict.fromkeys(unknown, LINE))
        now = await ask(
            self._inference, version_id, dict.fromkeys((probe.prompt for probe in probes), LINE)
        )
        said = {prompt: evaluation.answer_of(_text(answer)) for prompt, answer in before.items()}
        return [_answer(p.prompt, p.answer or said[p.prompt], now) for p in probes]


def refusal(found: GateFinding) -> str:
    """Why a version that did not pass is rejected."""
    first = found.failures[0]
    return (
        f"the gate: {found.edits_reliable} of {found.edits_asked} of its edits and "
        f"{found.prompts_unchanged} of {found.prompts_asked} protected prompts are answered as "
        f"they must be; for example {first.prompt!r} with {first.answer!r}, not {first.expected!r}"
    )


def _probes(file: Path | None) -> list[LocalityProbe]:
    return [] if file is None else prompt_files.read(file, "gate_prompts")


def _answer(prompt: str, expected: str, said: Mapping[str, Completion | None]) -> GateAnswer:
    return GateAnswer(prompt=prompt, expected=expected, answer=_text(said[prompt]))


def _text(said: Completion | None) -> str:
    """PostgreSQL keeps no NUL characters."""
    return said.text.replace("\0", "").strip() if said else ""


def _right(answer: GateAnswer) -> bool:
    return evaluation.matches(answer.answer, answer.expected)
