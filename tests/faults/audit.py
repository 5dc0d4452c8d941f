"""What coordinators did, as the database itself saw it: every change of a job and every commit.

Triggers write it down with who made the change and who held the lead at that moment; whoever
connects says its name as `application_name`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import psycopg

from service.jobs import JOB_TRANSITIONS, JobState
from service.store.leadership import COORDINATOR

_HELD = f"""
pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.objid = {COORDINATOR}
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
HOLDERS = f"SELECT a.application_name FROM {_HELD}"
"""Names of those that hold the lead: the server's own view."""
LOSE_LOCK = f"SELECT pg_terminate_backend(a.pid) FROM {_HELD} AND a.application_name = %s"
"""Ends the connection that holds the lead, if it is of the one named."""
_SCHEMA = f"""
CREATE TABLE audit (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    by TEXT DEFAULT current_setting('application_name'),
    leader TEXT DEFAULT '',
    job TEXT, state TEXT, trainer TEXT, generation BIGINT, version TEXT
);
CREATE FUNCTION audit_leader() RETURNS TEXT LANGUAGE sql AS $$
    SELECT coalesce(string_agg(application_name, ','), '') FROM ({HOLDERS}) held
$$;
CREATE FUNCTION audit_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit (leader, job, state, trainer)
    VALUES (audit_leader(), NEW.id, NEW.state, NEW.trainer_id);
    RETURN NULL;
END $$;
CREATE FUNCTION audit_commit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.generation <> OLD.generation THEN
        INSERT INTO audit (leader, generation, version)
        VALUES (audit_leader(), NEW.generation, NEW.version_id);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER audit_job AFTER INSERT OR UPDATE ON jobs
    FOR EACH ROW EXECUTE FUNCTION audit_job();
CREATE TRIGGER audit_commit AFTER UPDATE ON serving
    FOR EACH ROW EXECUTE FUNCTION audit_commit();
"""


@dataclass(frozen=True)
class Change:
    """Of a job: its state and who trains it then."""

    by: str
    leader: str
    state: str
    trainer: str | None


@dataclass(frozen=True)
class Commit:
    by: str
    leader: str
    generation: int
    version: str


class Audit:
    """Begun on a database; read at the end, when `check` says whether all was as it must be."""

    def __init__(self, url: str) -> None:
        self._url = url
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute(_SCHEMA)

    def jobs(self) -> dict[str, list[Change]]:
        """The changes of each job, in order: they wait for each other's row."""
        with psycopg.connect(self._url) as conn:
            rows = conn.execute(
                "SELECT job, by, leader, state, trainer FROM audit"
                " WHERE job IS NOT NULL ORDER BY job, id"
            ).fetchall()
        by_job = groupby(rows, key=lambda row: row[0])
        return {job: [Change(*row[1:]) for row in changes] for job, changes in by_job}

    def commits(self) -> list[Commit]:
        with psycopg.connect(self._url) as conn:
            rows = conn.execute(
                "SELECT by, leader, generation, version FROM audit"
                " WHERE generation IS NOT NULL ORDER BY id"
            ).fetchall()
        return [Commit(*row) for row in rows]


def check_generations(commits: Sequence[Commit]) -> None:
    """Each follows the one before."""
    assert [commit.generation for commit in commits] == list(range(2, len(commits) + 2))


def check_committed_once(commits: Sequence[Commit]) -> None:
    """Of versions that nobody activates again."""
    versions = [commit.version for commit in commits]
    assert len(versions) == len(set(versions)), versions


def check_job(changes: Sequence[Change]) -> None:
    """A legal way through the states, each entered once; trained by one at a time.

    Whoever takes the job is the only one to change it until another takes it, for good.
    """
    states = [JobState(state) for state, _ in groupby(changes, key=lambda change: change.state)]
    assert states[0] is JobState.PENDING
    assert all(after in JOB_TRANSITIONS[before] for before, after in pairwise(states)), states
    holders = [(trainer, *_writers(mine)) for trainer, mine in groupby(changes, key=_trainer)]
    trainers = [trainer for trainer, *_ in holders]
    assert len(trainers) == len(set(trainers)), "taken back from who took it"
    # Not the one before the first: whoever made the job made it for any leader.
    assert all(len(writers) == 1 for _, *writers in holders), holders


def _trainer(change: Change) -> str | None:
    return change.trainer


def _writers(changes: Iterable[Change]) -> list[str]:
    return sorted({change.by for change in changes})
