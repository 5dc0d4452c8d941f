"""Edits: what a client asked for and where it stands. No I/O."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from workers.contract import EditRecord, LocalityProbe


class EditState(StrEnum):
    QUEUED = "queued"
    CLAIMED = "claimed"
    APPLIED = "applied"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    REVERTING = "reverting"
    REVERTED = "reverted"


EDIT_TRANSITIONS: dict[EditState, frozenset[EditState]] = {
    EditState.QUEUED: frozenset({EditState.CLAIMED, EditState.CANCELLED, EditState.SUPERSEDED}),
    # A failed job gives its edits back; one whose fact was edited again meanwhile is superseded.
    EditState.CLAIMED: frozenset(
        {EditState.APPLIED, EditState.FAILED, EditState.QUEUED, EditState.SUPERSEDED}
    ),
    # A version rejected after publication gives its edits back.
    EditState.APPLIED: frozenset({EditState.QUEUED, EditState.SUPERSEDED, EditState.REVERTING}),
    EditState.FAILED: frozenset(),
    EditState.CANCELLED: frozenset(),
    EditState.SUPERSEDED: frozenset(),
    EditState.REVERTING: frozenset({EditState.REVERTED, EditState.APPLIED}),
    EditState.REVERTED: frozenset(),
}


def fact_key(prompt: str) -> str:
    """The identity of the fact a prompt asks for: the same prompt up to case and white space."""
    return " ".join(prompt.split()).casefold()


@dataclass(frozen=True)
class NewEdit:
    """A validated edit before it has an id."""

    prompt: str
    target: str
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[LocalityProbe, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EditEvent:
    """One entry of an edit's history."""

    at: datetime
    state: EditState
    job_id: str | None
    version_id: str | None
    detail: str | None


@dataclass(frozen=True)
class Edit:
    id: str
    prompt: str
    target: str
    subject: str | None
    rephrases: tuple[str, ...]
    locality: tuple[LocalityProbe, ...]
    metadata: dict[str, Any]
    state: EditState
    supersedes: str | None
    """The earlier edit of the same fact that this one replaces."""
    job_id: str | None
    version_id: str | None
    """The version that holds it, once applied (or that failed to)."""
    created_at: datetime
    updated_at: datetime

    def record(self) -> EditRecord:
        """The edit as a training job sees it."""
        return EditRecord(
            id=self.id,
            prompt=self.prompt,
            target=self.target,
            subject=self.subject,
            rephrases=self.rephrases,
            locality=self.locality,
        )
