"""The tables. `migrations/` builds the same ones; a test compares the two.

Two rules live in triggers, which metadata cannot hold (see the first migration): the serving
generation only grows, and the serving row is never deleted.
"""

from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Enum,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Sequence,
    SmallInteger,
    Table,
    Text,
    TypeDecorator,
    func,
)
from sqlalchemy.dialects.postgresql import JSONB

from service.edits import EditState
from service.jobs import FINISHED, JobKind, JobState, Trainer
from service.versions import ReplicaState, VersionState

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

version_numbers = Sequence("version_numbers", start=1, metadata=metadata)


class Timestamp(TypeDecorator[datetime]):
    """A moment, read back in UTC whatever the server's time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        return value and value.astimezone(UTC)


def _one_of(states: type[StrEnum], name: str = "state") -> Enum:
    return Enum(
        states,
        native_enum=False,
        create_constraint=True,
        length=16,
        name=name,
        values_callable=lambda members: [member.value for member in members],
    )


def _created() -> Column[datetime]:
    return Column("created_at", Timestamp, nullable=False, server_default=func.now())


def _updated() -> Column[datetime]:
    return Column("updated_at", Timestamp, nullable=False, server_default=func.now())


jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", _one_of(JobKind, "kind"), nullable=False),
    Column("state", _one_of(JobState), nullable=False),
    Column("activate", Boolean, nullable=False),
    Column("max_edits", Integer),
    Column("edit_ids", ARRAY(Text)),
    Column("hparams", JSONB, nullable=False),
    # How many earlier edits are asked again; null: all.
    Column("recheck", Integer),
    Column("trained_by", _one_of(Trainer, "trained_by"), nullable=False),
    Column("trainer_id", Text),
    # Of a runner, which nobody else can tell to be alive.
    Column("lease_until", Timestamp),
    Column("parent_id", Text, ForeignKey("versions.id", use_alter=True)),
    # No foreign key: it is allocated before the version exists.
    Column("version_id", Text, unique=True),
    Column("edits", Integer, nullable=False, server_default="0"),
    Column("progress", JSONB),
    Column("metrics", JSONB, nullable=False, server_default="{}"),
    Column("seconds", JSONB, nullable=False, server_default="{}"),
    Column("error", Text),
    _created(),
    _updated(),
    Column("finished_at", Timestamp),
    CheckConstraint(
        "(trained_by = 'runner') = (lease_until IS NOT NULL)", name="runner_has_a_lease"
    ),
)
Index(
    "ix_jobs_unfinished",
    jobs.c.id,
    postgresql_where=jobs.c.state.not_in(sorted(FINISHED)),
)

versions = Table(
    "versions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("number", Integer, nullable=False, unique=True),
    Column("parent_id", Text, ForeignKey("versions.id")),
    Column("job_id", Text, ForeignKey("jobs.id"), unique=True),
    Column("state", _one_of(VersionState), nullable=False),
    Column("base_fingerprint", Text, nullable=False),
    Column("metrics", JSONB, nullable=False, server_default="{}"),
    Column("edits", Integer, nullable=False, server_default="0"),
    Column("error", Text),
    # What the gate found; null before it was asked.
    Column("gate", JSONB),
    Column("activated_at", Timestamp),
    _created(),
    _updated(),
    CheckConstraint("id = 'v' || number", name="id_is_number"),
)
Index(
    "uq_versions_one_live",
    versions.c.state,
    unique=True,
    postgresql_where=versions.c.state == VersionState.LIVE,
)

edits = Table(
    "edits",
    metadata,
    Column("id", Text, primary_key=True),
    # sha256 of `service.edits.fact_key`: the key itself may be longer than an index entry.
    Column("fact", LargeBinary(32), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("subject", Text),
    Column("rephrases", JSONB, nullable=False),
    Column("locality", JSONB, nullable=False),
    Column("metadata", JSONB, nullable=False),
    Column("state", _one_of(EditState), nullable=False),
    Column("supersedes", Text, ForeignKey("edits.id")),
    Column("job_id", Text, ForeignKey("jobs.id")),
    Column("version_id", Text, ForeignKey("versions.id")),
    _created(),
    _updated(),
)
Index(
    "uq_edits_one_queued_per_fact",
    edits.c.fact,
    unique=True,
    postgresql_where=edits.c.state == EditState.QUEUED,
)
Index("ix_edits_fact", edits.c.fact)
Index("ix_edits_state", edits.c.state, edits.c.id)

edit_events = Table(
    "edit_events",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("edit_id", Text, ForeignKey("edits.id"), nullable=False),
    Column("at", Timestamp, nullable=False, server_default=func.now()),
    Column("state", _one_of(EditState), nullable=False),
    Column("job_id", Text),
    Column("version_id", Text),
    Column("detail", Text),
)
Index("ix_edit_events_edit", edit_events.c.edit_id, edit_events.c.id)

job_edits = Table(
    "job_edits",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id"), primary_key=True),
    Column("edit_id", Text, ForeignKey("edits.id"), primary_key=True),
    # False once the job has settled or released it.
    Column("open", Boolean, nullable=False, server_default="true"),
    # A rebuild trains it again; it stays applied, in this version until the new one holds it.
    Column("kept_from", Text, ForeignKey("versions.id")),
)
Index(
    "uq_job_edits_one_open_per_edit",
    job_edits.c.edit_id,
    unique=True,
    postgresql_where=job_edits.c.open,
)

# What a job trains along, so that a run that is taken up again is the same run.
retentions = Table(
    "retentions",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id"), primary_key=True),
    Column("rehearsed", ARRAY(Text), nullable=False),
    Column("anchors", JSONB, nullable=False),
)

version_edits = Table(
    "version_edits",
    metadata,
    Column("version_id", Text, ForeignKey("versions.id"), primary_key=True),
    Column("edit_id", Text, ForeignKey("edits.id"), primary_key=True),
    Column("held", Boolean, nullable=False),
    # The verdict; null where the edit came from the parent and was not asked again.
    Column("reliable", Boolean),
    Column("answer", Text),
    Column("generalization", Float),
    Column("locality", Float),
    # The verdicts in the other prompt formats, by format.
    Column("formats", JSONB, nullable=False, server_default="{}"),
)
Index("ix_version_edits_edit", version_edits.c.edit_id)

serving = Table(
    "serving",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False, server_default="1"),
    Column("generation", BigInteger, nullable=False),
    Column("version_id", Text, ForeignKey("versions.id"), nullable=False),
    Column("staging_id", Text, ForeignKey("versions.id")),
    # As a canary for so many percent of the queries; null: for all of them.
    Column("staging_percent", Float),
    Column("staging_promote_after_s", Float),
    Column("canary_id", Text, ForeignKey("versions.id")),
    Column("canary_percent", Float),
    Column("canary_promote_at", Timestamp),
    _updated(),
    CheckConstraint("id = 1", name="one_row"),
    CheckConstraint("staging_id <> version_id", name="staging_is_another"),
    CheckConstraint("canary_id <> version_id", name="canary_is_another"),
    CheckConstraint("(canary_id IS NULL) = (canary_percent IS NULL)", name="canary_has_a_share"),
    CheckConstraint("canary_percent > 0 AND canary_percent < 100", name="canary_percent"),
    CheckConstraint("staging_percent > 0 AND staging_percent < 100", name="staging_percent"),
)

replicas = Table(
    "replicas",
    metadata,
    Column("id", Text, primary_key=True),
    # The Ray cluster that runs it: each coordinator knows only its own cluster's replicas.
    Column("cluster", Text, nullable=False),
    Column("state", _one_of(ReplicaState), nullable=False),
    Column("resident", ARRAY(Text), nullable=False),
    Column("heartbeat_at", Timestamp, nullable=False, server_default=func.now()),
)

acknowledgements = Table(
    "acknowledgements",
    metadata,
    Column("replica_id", Text, ForeignKey("replicas.id", ondelete="CASCADE"), primary_key=True),
    Column("version_id", Text, ForeignKey("versions.id"), primary_key=True),
    Column("digest", Text),
    Column("error", Text),
    Column("staged_at", Timestamp, nullable=False, server_default=func.now()),
    CheckConstraint("(digest IS NULL) <> (error IS NULL)", name="digest_or_error"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("key", Text, primary_key=True),
    Column("route", Text, primary_key=True),
    Column("body_sha256", LargeBinary(32), nullable=False),
    Column("answer", JSONB),
    _created(),
)
Index("ix_idempotency_keys_created", idempotency_keys.c.created_at)
