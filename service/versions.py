"""Versions, what is committed, and which replica holds what. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

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
    VersionState.STAGED: frozenset(
        {VersionState.LIVE, VersionState.PUBLISHED, VersionState.RETIRED, VersionState.REJECTED}
    ),
    VersionState.LIVE: frozenset({VersionState.RETIRED}),
    VersionState.RETIRED: frozenset({VersionState.STAGING, VersionState.REJECTED}),
    VersionState.REJECTED: frozenset(),
}


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
    """Why it was rejected."""
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class Serving:
    """The one row that decides what is served."""

    generation: int
    version_id: str
    staging_id: str | None
    updated_at: datetime


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
    state: ReplicaState
    resident: tuple[str, ...]
    staged: tuple[StagedVersion, ...]
    heartbeat_at: datetime
