"""The first schema, and the rules of the serving row that only a trigger can hold."""

from alembic import op

revision = "0001"
down_revision = None

SCHEMA = """
CREATE SEQUENCE version_numbers START WITH 1;
CREATE TABLE jobs (
    id TEXT NOT NULL,
    kind VARCHAR(16) NOT NULL,
    state VARCHAR(16) NOT NULL,
    activate BOOLEAN NOT NULL,
    max_edits INTEGER,
    edit_ids TEXT[],
    hparams JSONB NOT NULL,
    recheck INTEGER,
    trained_by VARCHAR(16) NOT NULL,
    trainer_id TEXT,
    lease_until TIMESTAMP WITH TIME ZONE,
    parent_id TEXT,
    version_id TEXT,
    edits INTEGER DEFAULT '0' NOT NULL,
    progress JSONB,
    metrics JSONB DEFAULT '{}' NOT NULL,
    seconds JSONB DEFAULT '{}' NOT NULL,
    error TEXT,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT pk_jobs PRIMARY KEY (id),
    CONSTRAINT ck_jobs_kind CHECK (kind IN ('extend', 'rebuild')),
    CONSTRAINT ck_jobs_state
        CHECK (state IN ('pending', 'training', 'evaluating', 'publishing', 'rolling_out',
            'done', 'failed', 'cancelled')),
    CONSTRAINT ck_jobs_trained_by CHECK (trained_by IN ('coordinator', 'runner')),
    CONSTRAINT ck_jobs_runner_has_a_lease
        CHECK ((trained_by = 'runner') = (lease_until IS NOT NULL)),
    CONSTRAINT uq_jobs_version_id UNIQUE (version_id)
);
CREATE INDEX ix_jobs_unfinished ON jobs (id) WHERE (state NOT IN ('cancelled', 'done', 'failed'));
CREATE TABLE replicas (
    id TEXT NOT NULL,
    cluster TEXT NOT NULL,
    state VARCHAR(16) NOT NULL,
    resident TEXT[] NOT NULL,
    heartbeat_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_replicas PRIMARY KEY (id),
    CONSTRAINT ck_replicas_state CHECK (state IN ('ready', 'fenced'))
);
CREATE TABLE idempotency_keys (
    key TEXT NOT NULL,
    route TEXT NOT NULL,
    body_sha256 BYTEA NOT NULL,
    answer JSONB,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_idempotency_keys PRIMARY KEY (key, route)
);
CREATE INDEX ix_idempotency_keys_created ON idempotency_keys (created_at);
CREATE TABLE versions (
    id TEXT NOT NULL,
    number INTEGER NOT NULL,
    parent_id TEXT,
    job_id TEXT,
    state VARCHAR(16) NOT NULL,
    base_fingerprint TEXT NOT NULL,
    metrics JSONB DEFAULT '{}' NOT NULL,
    edits INTEGER DEFAULT '0' NOT NULL,
    error TEXT,
    gate JSONB,
    activated_at TIMESTAMP WITH TIME ZONE,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_versions PRIMARY KEY (id),
    CONSTRAINT ck_versions_id_is_number CHECK (id = 'v' || number),
    CONSTRAINT uq_versions_number UNIQUE (number),
    CONSTRAINT fk_versions_parent_id FOREIGN KEY (parent_id) REFERENCES versions (id),
    CONSTRAINT uq_versions_job_id UNIQUE (job_id),
    CONSTRAINT fk_versions_job_id FOREIGN KEY (job_id) REFERENCES jobs (id),
    CONSTRAINT ck_versions_state
        CHECK (state IN ('published', 'staging', 'staged', 'live', 'retired', 'rejected'))
);
CREATE UNIQUE INDEX uq_versions_one_live ON versions (state) WHERE state = 'live';
CREATE TABLE edits (
    id TEXT NOT NULL,
    fact BYTEA NOT NULL,
    prompt TEXT NOT NULL,
    target TEXT NOT NULL,
    subject TEXT,
    rephrases JSONB NOT NULL,
    locality JSONB NOT NULL,
    metadata JSONB NOT NULL,
    state VARCHAR(16) NOT NULL,
    supersedes TEXT,
    job_id TEXT,
    version_id TEXT,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_edits PRIMARY KEY (id),
    CONSTRAINT ck_edits_state
        CHECK (state IN ('queued', 'claimed', 'applied', 'failed', 'cancelled', 'superseded',
            'reverting', 'reverted')),
    CONSTRAINT fk_edits_supersedes FOREIGN KEY (supersedes) REFERENCES edits (id),
    CONSTRAINT fk_edits_job_id FOREIGN KEY (job_id) REFERENCES jobs (id),
    CONSTRAINT fk_edits_version_id FOREIGN KEY (version_id) REFERENCES versions (id)
);
CREATE UNIQUE INDEX uq_edits_one_queued_per_fact ON edits (fact) WHERE state = 'queued';
CREATE INDEX ix_edits_state ON edits (state, id);
CREATE INDEX ix_edits_fact ON edits (fact);
CREATE TABLE serving (
    id SMALLINT DEFAULT '1' NOT NULL,
    generation BIGINT NOT NULL,
    version_id TEXT NOT NULL,
    staging_id TEXT,
    staging_percent FLOAT,
    staging_promote_after_s FLOAT,
    canary_id TEXT,
    canary_percent FLOAT,
    canary_promote_at TIMESTAMP WITH TIME ZONE,
    updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_serving PRIMARY KEY (id),
    CONSTRAINT ck_serving_one_row CHECK (id = 1),
    CONSTRAINT ck_serving_staging_is_another CHECK (staging_id <> version_id),
    CONSTRAINT ck_serving_canary_is_another CHECK (canary_id <> version_id),
    CONSTRAINT ck_serving_canary_has_a_share
        CHECK ((canary_id IS NULL) = (canary_percent IS NULL)),
    CONSTRAINT ck_serving_canary_percent CHECK (canary_percent > 0 AND canary_percent < 100),
    CONSTRAINT ck_serving_staging_percent CHECK (staging_percent > 0 AND staging_percent < 100),
    CONSTRAINT fk_serving_version_id FOREIGN KEY (version_id) REFERENCES versions (id),
    CONSTRAINT fk_serving_staging_id FOREIGN KEY (staging_id) REFERENCES versions (id),
    CONSTRAINT fk_serving_canary_id FOREIGN KEY (canary_id) REFERENCES versions (id)
);
CREATE TABLE acknowledgements (
    replica_id TEXT NOT NULL,
    version_id TEXT NOT NULL,
    digest TEXT,
    error TEXT,
    staged_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT pk_acknowledgements PRIMARY KEY (replica_id, version_id),
    CONSTRAINT ck_acknowledgements_digest_or_error CHECK ((digest IS NULL) <> (error IS NULL)),
    CONSTRAINT fk_acknowledgements_replica_id FOREIGN KEY (replica_id)
        REFERENCES replicas (id) ON DELETE CASCADE,
    CONSTRAINT fk_acknowledgements_version_id FOREIGN KEY (version_id) REFERENCES versions (id)
);
CREATE TABLE edit_events (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    edit_id TEXT NOT NULL,
    at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    state VARCHAR(16) NOT NULL,
    job_id TEXT,
    version_id TEXT,
    detail TEXT,
    CONSTRAINT pk_edit_events PRIMARY KEY (id),
    CONSTRAINT fk_edit_events_edit_id FOREIGN KEY (edit_id) REFERENCES edits (id),
    CONSTRAINT ck_edit_events_state
        CHECK (state IN ('queued', 'claimed', 'applied', 'failed', 'cancelled', 'superseded',
            'reverting', 'reverted'))
);
CREATE INDEX ix_edit_events_edit ON edit_events (edit_id, id);
CREATE TABLE job_edits (
    job_id TEXT NOT NULL,
    edit_id TEXT NOT NULL,
    open BOOLEAN DEFAULT 'true' NOT NULL,
    kept_from TEXT,
    CONSTRAINT pk_job_edits PRIMARY KEY (job_id, edit_id),
    CONSTRAINT fk_job_edits_job_id FOREIGN KEY (job_id) REFERENCES jobs (id),
    CONSTRAINT fk_job_edits_edit_id FOREIGN KEY (edit_id) REFERENCES edits (id),
    CONSTRAINT fk_job_edits_kept_from FOREIGN KEY (kept_from) REFERENCES versions (id)
);
CREATE UNIQUE INDEX uq_job_edits_one_open_per_edit ON job_edits (edit_id) WHERE open;
CREATE TABLE retentions (
    job_id TEXT NOT NULL,
    rehearsed TEXT[] NOT NULL,
    anchors JSONB NOT NULL,
    CONSTRAINT pk_retentions PRIMARY KEY (job_id),
    CONSTRAINT fk_retentions_job_id FOREIGN KEY (job_id) REFERENCES jobs (id)
);
CREATE TABLE version_edits (
    version_id TEXT NOT NULL,
    edit_id TEXT NOT NULL,
    held BOOLEAN NOT NULL,
    reliable BOOLEAN,
    answer TEXT,
    generalization FLOAT,
    locality FLOAT,
    formats JSONB DEFAULT '{}' NOT NULL,
    CONSTRAINT pk_version_edits PRIMARY KEY (version_id, edit_id),
    CONSTRAINT fk_version_edits_version_id FOREIGN KEY (version_id) REFERENCES versions (id),
    CONSTRAINT fk_version_edits_edit_id FOREIGN KEY (edit_id) REFERENCES edits (id)
);
CREATE INDEX ix_version_edits_edit ON version_edits (edit_id);
ALTER TABLE jobs ADD CONSTRAINT fk_jobs_parent_id FOREIGN KEY (parent_id)
    REFERENCES versions (id);
"""

SERVING_RULES = """
CREATE FUNCTION serving_only_advances() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION 'the serving row is never deleted';
    END IF;
    IF NEW.generation < OLD.generation
        OR ((NEW.version_id, NEW.canary_id, NEW.canary_percent)
            IS DISTINCT FROM (OLD.version_id, OLD.canary_id, OLD.canary_percent)
            AND NEW.generation = OLD.generation) THEN
        RAISE EXCEPTION 'serving generation % (%) cannot follow % (%)',
            NEW.generation, NEW.version_id, OLD.generation, OLD.version_id;
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER serving_only_advances BEFORE UPDATE OR DELETE ON serving
    FOR EACH ROW EXECUTE FUNCTION serving_only_advances();
"""


def upgrade() -> None:
    """Build everything in an empty database."""
    op.execute(SCHEMA)
    op.execute(SERVING_RULES)


def downgrade() -> None:
    """Drop everything."""
    op.execute(
        """
        DROP TABLE acknowledgements, replicas, serving, idempotency_keys, edit_events, job_edits,
            retentions, version_edits, edits, versions, jobs CASCADE;
        DROP SEQUENCE version_numbers;
        DROP FUNCTION serving_only_advances;
        """
    )
