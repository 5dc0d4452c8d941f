"""Versions, what is committed, and which replica holds what. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from workers.contract import Record
from workers.evaluation import Verdict as Verdict

BASE_VERSION = "v0"


class VersionState(StrEnum):
    PUBLISHED = "published"
    STAGING = "staging"
    STAGED = "staged"
    LIVE = "live"
    RETIRED = "retired"
    REJECTED = "rejected"


VERSION_TRANSITIONS: dict[VersionState, frozenset[VersionState]] = {
    VersionState.PUBLISHED: frozenset({VersionState.STAGING, VersionState.REJECTED}),
    # A rollout that is given up leaves the version as it was.
    VersionState.STAGING: frozenset(
        {
            VersionState.STAGED,
            VersionState.PUBLISHED,
            VersionState.RETIRED,
            VersionState.REJECTED,
        }
    ),
    # Staged anew: a canary is promoted, or given another share.
    VersionState.STAGED: frozenset(
        {
            VersionState.STAGING,
            VersionState.LIVE,
            VersionState.PUBLISHED,
            VersionState.RETIRED,
            VersionState.REJECTED,
        }
    ),
    VersionState.LIVE: frozenset({VersionState.RETIRED}),
    VersionState.RETIRED: frozenset({VersionState.STAGING, VersionState.REJECTED}),
    VersionState.REJECTED: frozenset(),
}


class GateAnswer(Record):
    """A prompt that was not answered as it must be."""

    prompt: str
    expected: str
    answer: str


class GateFinding(Record):
    """What a version answered before it was let serve; the evidence for or against it."""

    passed: bool
    edits_asked: int
    """A sample of the edits that were reliable in it when it was made."""
    edits_reliable: int
    prompts_asked: int
    """Those whose answers no version may change."""
    prompts_unchanged: int
    failures: tuple[GateAnswer, ...] = ()
    """The first of them."""


@dataclass(frozen=True)
class Version:
    id: str
    parent_id: str | None
    job_id: str | None
    state: VersionState
    base_fingerprint: str
    metrics: Mapping[str, float]
    edits: int
    """How many edits it holds, its parents' included."""
    error: str | None
    """Why it was rejected, or its last rollout given up."""
    gate: GateFinding | None
    """What the gate found; None before it was asked."""
    activated_at: datetime | None
    """When it last became live."""
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class Canary:
    """A version that answers a share of the queries, beside the committed one."""

    version_id: str
    percent: float
    """Of the queries that name no version; above 0, below 100."""
    promote_at: datetime | None = None
    """When it is promoted, if the gate lets it pass again; None: only when asked."""


@dataclass(frozen=True)
class Committed:
    """What answers the queries that name no version."""

    generation: int
    version_id: str
    canary: Canary | None = None


@dataclass(frozen=True)
class Serving:
    """The one row that decides what is served."""

    generation: int
    version_id: str
    parent_id: str | None
    """The live version's parent."""
    staging_id: str | None
    staging_percent: float | None
    """The share it is staged for, as a canary; None: for all queries."""
    canary: Canary | None
    updated_at: datetime

    @property
    def committed(self) -> Committed:
        return Committed(self.generation, self.version_id, self.canary)

    @property
    def wanted(self) -> tuple[str, ...]:
        """What every replica must hold: what is live, being staged, and the canary."""
        canary = None if self.canary is None else self.canary.version_id
        return tuple(dict.fromkeys(filter(None, (self.version_id, self.staging_id, canary))))


class ReplicaState(StrEnum):
    READY = "ready"
    FENCED = "fenced"


@dataclass(frozen=True)
class StagedVersion:
    """A replica's acknowledgement: what it loaded, or why it could not."""

    version_id: str
    digest: str | None
    """sha256 over the loaded tensors, as the manifest states it; None if it failed."""
    error: str | None
    staged_at: datetime


@dataclass(frozen=True)
class ReplicaStatus:
    id: str
    cluster: str
    """The Ray cluster that runs it."""
    state: ReplicaState
    resident: tuple[str, ...]
    staged: tuple[StagedVersion, ...]
    heartbeat_at: datetime
