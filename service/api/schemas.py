"""HTTP types only: what is accepted, exactly, and what is answered."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from service.edits import Edit, EditEvent, EditState, NewEdit
from service.errors import FieldError, InvalidInput
from service.jobs import Job, JobKind, JobState, Trainer
from service.versions import (
    Canary,
    GateFinding,
    ReplicaState,
    ReplicaStatus,
    Serving,
    Verdict,
    Version,
    VersionState,
)
from workers.contract import Format, Hparams, LocalityProbe, Progress
from workers.evaluation import FormatVerdict

METADATA_BYTES = 4096
METADATA_DEPTH = 32
MOST_EDITS = 1_000_000


def storable(value: str) -> str:
    """PostgreSQL holds neither NUL characters nor lone surrogates."""
    if "\0" in value:
        raise ValueError("holds a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds half of a surrogate pair")
    return value


def _said(value: str) -> str:
    if not value.strip():
        raise ValueError("is only white space")
    return storable(value)


def _storable_object(value: dict[str, Any]) -> dict[str, Any]:
    level: list[Any] = [value]
    for _ in range(METADATA_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                storable(item)
        level = inner
    if level:
        raise ValueError(f"is nested more than {METADATA_DEPTH} levels deep")
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError("holds NaN or an infinity, which JSON has no word for") from error
    return value


def _small(value: dict[str, Any]) -> dict[str, Any]:
    size = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
    if size > METADATA_BYTES:
        raise ValueError(f"is {size} bytes as JSON; at most {METADATA_BYTES} are kept")
    return value


def _how_many(value: object) -> object:
    if value is None or value == "all":
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_EDITS:
        return value
    raise ValueError(f'must be "all" or a number from 0 to {MOST_EDITS:,}')


Prompt = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_said)]
Answer = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_said)]
Storable = AfterValidator(_storable_object)
HowMany = Annotated[int | Literal["all"] | None, BeforeValidator(_how_many)]
EditId = Annotated[str, Field(pattern=r"^\w{1,64}$")]


class Accepted(BaseModel):
    """What a client sends; unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LocalityIn(Accepted):
    prompt: Prompt
    answer: Answer | None = None


class EditIn(Accepted):
    prompt: Prompt
    target: Answer
    subject: Answer | None = None
    rephrases: Annotated[list[Prompt], Field(max_length=16)] = []
    locality: Annotated[list[LocalityIn], Field(max_length=16)] = []
    metadata: Annotated[dict[str, Any], Storable, AfterValidator(_small)] = {}

    def record(self) -> NewEdit:
        return NewEdit(
            prompt=self.prompt,
            target=self.target,
            subject=self.subject,
            rephrases=tuple(self.rephrases),
            locality=tuple(LocalityProbe(**probe.model_dump()) for probe in self.locality),
            metadata=self.metadata,
        )


class EditsIn(Accepted):
    edits: Annotated[list[EditIn], Field(min_length=1, max_length=1000)]


class JobIn(Accepted):
    kind: JobKind = JobKind.EXTEND
    max_edits: Annotated[StrictInt, Field(ge=1, le=MOST_EDITS)] | None = None
    edit_ids: Annotated[list[EditId], Field(min_length=1, max_length=10_000)] | None = None
    hparams: Annotated[dict[str, Any], Storable] = {}
    activate: StrictBool = True
    recheck: HowMany = None
    """How many earlier edits are asked again of the new version; none: as the service is set."""

    def rechecked(self, default: int) -> int | None:
        """As `service.jobs.Job.recheck`: None is all."""
        if self.recheck is None:
            return default
        return None if self.recheck == "all" else self.recheck

    def checked_hparams(self) -> dict[str, Any]:
        """The overrides of `workers.contract.Hparams`; `InvalidInput` for one that does not fit."""
        errors = [
            FieldError(f"hparams.{name}", message)
            for name, value in self.hparams.items()
            if (message := _misfit(name, value)) is not None
        ]
        if errors:
            named = ", ".join(error.field for error in errors)
            raise InvalidInput(f"the request is not valid: {named}", tuple(errors))
        return self.hparams


def _misfit(name: str, value: Any) -> str | None:
    field = Hparams.model_fields.get(name)
    if field is None:
        return f"is not a hyperparameter; there are {', '.join(Hparams.model_fields)}"
    kind: Any = Annotated[field.annotation, field]
    try:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return error.errors()[0]["msg"]
    return None


class StoredEdit(BaseModel):
    """An edit as POST /edits acknowledges it."""

    id: str
    state: EditState
    supersedes: str | None = None


class StoredEdits(BaseModel):
    edits: list[StoredEdit]

    @classmethod
    def of(cls, edits: list[Edit]) -> Self:
        stored = [StoredEdit(id=e.id, state=e.state, supersedes=e.supersedes) for e in edits]
        return cls(edits=stored)


class EditOut(BaseModel):
    id: str
    prompt: str
    target: str
    subject: str | None
    rephrases: list[str]
    locality: list[LocalityProbe]
    metadata: dict[str, Any]
    state: EditState
    supersedes: str | None
    job: str | None
    version: str | None
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, edit: Edit, **more: Any) -> Self:
        return cls.model_validate(
            {**vars(edit), "job": edit.job_id, "version": edit.version_id, **more}
        )


class EditEventOut(BaseModel):
    at: datetime
    state: EditState
    job: str | None
    version: str | None
    detail: str | None

    @classmethod
    def of(cls, event: EditEvent) -> Self:
        return cls.model_validate({**vars(event), "job": event.job_id, "version": event.version_id})


class VerdictOut(BaseModel):
    """How an edit came out in a version: in the first prompt format, then in the others."""

    edit: str
    version: str
    reliable: bool
    answer: str
    generalization: float | None
    locality: float | None
    formats: Mapping[Format, FormatVerdict]

    @classmethod
    def of(cls, version_id: str, verdict: Verdict) -> Self:
        shown = {"edit": verdict.edit_id, "version": version_id}
        return cls.model_validate({**verdict.model_dump(), **shown})


class EditWithHistory(EditOut):
    history: list[EditEventOut]
    verdict: VerdictOut | None
    """In the newest version that was asked."""


class EditPage(BaseModel):
    edits: list[EditOut]
    next_cursor: str | None


class JobOut(BaseModel):
    id: str
    kind: JobKind
    state: JobState
    activate: bool
    max_edits: int | None
    edit_ids: list[str] | None
    hparams: Mapping[str, Any]
    recheck: int | Literal["all"]
    trained_by: Trainer
    parent: str | None
    version: str | None
    edits: int
    progress: Progress | None
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    error: str | None
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls.model_validate(
            {
                **vars(job),
                "recheck": "all" if job.recheck is None else job.recheck,
                "parent": job.parent_id,
                "version": job.version_id,
            }
        )


class JobPage(BaseModel):
    jobs: list[JobOut]
    next_cursor: str | None


class VersionOut(BaseModel):
    id: str
    parent: str | None
    job: str | None
    state: VersionState
    base_fingerprint: str
    metrics: Mapping[str, float]
    edits: int
    error: str | None
    gate: GateFinding | None
    """What it answered before it was let serve; null before it was asked."""
    activated_at: datetime | None
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, version: Version, **more: Any) -> Self:
        return cls.model_validate(
            {**vars(version), "parent": version.parent_id, "job": version.job_id, **more}
        )


class VersionWithVerdicts(VersionOut):
    verdicts: list[VerdictOut]
    next_cursor: str | None


class VersionPage(BaseModel):
    versions: list[VersionOut]
    next_cursor: str | None


class ActivateBody(BaseModel):
    """`POST /versions/{id}/activate`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    percent: float = Field(default=100, gt=0, le=100)
    """Of the queries that name no version; below 100, the version is a canary."""
    promote_after_s: float | None = Field(default=None, gt=0, le=30 * 86_400)
    """A canary is promoted by itself after so many seconds, if the gate lets it pass again."""

    @model_validator(mode="after")
    def _of_a_canary(self) -> Self:
        if self.promote_after_s is not None and self.percent == 100:
            raise ValueError("promote_after_s is for a canary: give a percent below 100 with it")
        return self


class ReplicaOut(BaseModel):
    id: str
    cluster: str
    """The Ray cluster that runs it."""
    state: ReplicaState
    resident: list[str]
    staged_at: datetime | None
    """When it acknowledged what is being staged, or else what is live."""

    @classmethod
    def of(cls, replica: ReplicaStatus, version_id: str) -> Self:
        staged = {ack.version_id: ack.staged_at for ack in replica.staged if ack.digest}
        return cls.model_validate({**vars(replica), "staged_at": staged.get(version_id)})


class CanaryOut(BaseModel):
    version: str
    percent: float
    promote_at: datetime | None

    @classmethod
    def of(cls, canary: Canary) -> Self:
        return cls(version=canary.version_id, percent=canary.percent, promote_at=canary.promote_at)


class ServingOut(BaseModel):
    generation: int
    version: str
    staging: str | None
    staging_percent: float | None
    """The share that the version being staged will have as a canary; null: all."""
    canary: CanaryOut | None
    replicas: list[ReplicaOut]

    @classmethod
    def of(cls, serving: Serving, replicas: list[ReplicaStatus]) -> Self:
        shown = serving.staging_id or serving.version_id
        return cls(
            generation=serving.generation,
            version=serving.version_id,
            staging=serving.staging_id,
            staging_percent=serving.staging_percent,
            canary=None if serving.canary is None else CanaryOut.of(serving.canary),
            replicas=[ReplicaOut.of(replica, shown) for replica in replicas],
        )
