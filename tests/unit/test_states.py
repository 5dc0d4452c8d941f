"""The transition tables, and that the schema knows the same states."""

from enum import StrEnum

import pytest
from sqlalchemy import CheckConstraint, Table

from service.edits import EDIT_TRANSITIONS, EditState, fact_key
from service.jobs import FINISHED, JOB_TRANSITIONS, JobKind, JobState
from service.store import tables
from service.versions import VERSION_TRANSITIONS, ReplicaState, VersionState


@pytest.mark.parametrize(
    ("states", "transitions", "start"),
    [
        (EditState, EDIT_TRANSITIONS, EditState.QUEUED),
        (JobState, JOB_TRANSITIONS, JobState.PENDING),
        (VersionState, VERSION_TRANSITIONS, VersionState.PUBLISHED),
    ],
)
def test_every_state_is_listed_and_reachable(
    states: type[StrEnum], transitions: dict[StrEnum, frozenset[StrEnum]], start: StrEnum
) -> None:
    assert set(transitions) == set(states)
    reached, frontier = {start}, {start}
    while frontier:
        frontier = {after for state in frontier for after in transitions[state]} - reached
        reached |= frontier
    assert reached == set(states)
    assert all(state not in following for state, following in transitions.items())


def test_a_job_ends_in_one_of_three_states() -> None:
    assert {JobState.DONE, JobState.FAILED, JobState.CANCELLED} == FINISHED


@pytest.mark.parametrize(
    ("table", "column", "states"),
    [
        (tables.edits, "state", EditState),
        (tables.edit_events, "state", EditState),
        (tables.jobs, "state", JobState),
        (tables.jobs, "kind", JobKind),
        (tables.versions, "state", VersionState),
        (tables.replicas, "state", ReplicaState),
    ],
)
def test_the_schema_allows_exactly_the_states(
    table: Table, column: str, states: type[StrEnum]
) -> None:
    checks = {c.name: c for c in table.constraints if isinstance(c, CheckConstraint)}
    text = str(
        checks[f"ck_{table.name}_{column}"].sqltext.compile(compile_kwargs={"literal_binds": True})
    )
    assert all(f"'{state}'" in text for state in states)
    assert text.count("'") == 2 * len(states)


def test_a_fact_is_a_prompt_up_to_case_and_white_space() -> None:
    assert fact_key(" The  CEO of\nX is") == fact_key("the ceo of x IS ")
    assert fact_key("The CEO of X is") != fact_key("The CEO of Y is")
