from datetime import timedelta

import pytest

from service.coordinator.policy import Policy


@pytest.mark.parametrize(
    ("policy", "queued", "age_s", "due"),
    [
        (Policy(None, None), 1000, 1e6, False),
        (Policy(10, None), 9, 1e6, False),
        (Policy(10, None), 10, 0, True),
        (Policy(None, 60), 1, 59, False),
        (Policy(None, 60), 1, 60, True),
        (Policy(10, 60), 3, 61, True),
        (Policy(10, 60), 0, None, False),
    ],
)
def test_a_job_is_due_after_enough_edits_or_enough_time(
    policy: Policy, queued: int, age_s: float | None, due: bool
) -> None:
    age = None if age_s is None else timedelta(seconds=age_s)
    assert policy.due(queued, age) is due
