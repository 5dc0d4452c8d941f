"""What must hold at any moment, whatever has just died; read from the database itself."""

from itertools import pairwise
from typing import Any

import psycopg

from service.edits import EDIT_TRANSITIONS, EditState
from service.jobs import FINISHED, JobState

Row = tuple[Any, ...]


class Invariants:
    """Checked again and again: some are about what was seen before."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._generation = 0
        self.acknowledged: set[str] = set()
        """Ids of edits that a client was told are stored."""

    def serving_replicas(self) -> int:
        """Those that have told of themselves within two heartbeats."""
        fresh = "heartbeat_at > clock_timestamp() - interval '2 s'"
        with psycopg.connect(self._url) as conn:
            [(number,)] = conn.execute(
                f"SELECT count(*) FROM replicas WHERE state = 'ready' AND {fresh}"
            )
        return int(number)

    def check(self) -> None:
        with psycopg.connect(self._url) as conn:
            self._one_committed_version(conn)
            self._every_edit_accounted_for(conn)

    def check_at_rest(self) -> None:
        """Once no job runs: nothing is claimed, and every edit's history is a legal one."""
        self.check()
        with psycopg.connect(self._url) as conn:
            left = conn.execute("SELECT id FROM edits WHERE state = 'claimed'").fetchall()
            assert left == []
            unfinished = [
                (job_id, state)
                for job_id, state in conn.execute("SELECT id, state FROM jobs")
                if JobState(state) not in FINISHED
            ]
            assert unfinished == []
            events = conn.execute("SELECT edit_id, state FROM edit_events ORDER BY edit_id, id")
            self._legal(events.fetchall(), dict(conn.execute("SELECT id, state FROM edits")))

    def _one_committed_version(self, conn: psycopg.Connection[Row]) -> None:
        rows = conn.execute(
            "SELECT generation, version_id, staging_id, canary_id,"
            " (SELECT array_agg(id) FROM versions WHERE state = 'live'),"
            " (SELECT array_agg(id) FROM versions WHERE state = 'staging') FROM serving"
        ).fetchall()
        [(generation, version_id, staging_id, canary_id, live, staging)] = rows
        assert generation >= self._generation
        assert live == [version_id]
        assert set(staging or ()) <= {staging_id}
        assert canary_id != version_id
        self._generation = generation

    def _every_edit_accounted_for(self, conn: psycopg.Connection[Row]) -> None:
        rows = conn.execute(
            "SELECT e.id, e.state, (SELECT count(*) FROM job_edits j WHERE j.edit_id = e.id"
            " AND j.open AND j.kept_from IS NULL) FROM edits e"
        ).fetchall()
        assert {edit_id for edit_id, _, _ in rows} >= self.acknowledged
        unclaimed = [edit_id for edit_id, state, jobs in rows if (state == "claimed") != jobs]
        assert unclaimed == []

    def _legal(self, events: list[Row], present: dict[str, str]) -> None:
        history: dict[str, list[EditState]] = {}
        for edit_id, state in events:
            history.setdefault(edit_id, []).append(EditState(state))
        assert history.keys() == present.keys()
        for edit_id, states in history.items():
            assert states[-1] == present[edit_id]
            for before, after in pairwise(states):
                assert before is after or after in EDIT_TRANSITIONS[before], (edit_id, states)
