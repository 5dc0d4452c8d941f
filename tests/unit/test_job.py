"""What is made of Ray Train's report of a run that failed."""

import pytest
import torch.distributed as dist
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from workers.errors import ArtifactError, TrainingFailed, WorkersError
from workers.job import _cause, _died, _reraise


def as_told(cause: Exception) -> RayTaskError:
    """As Ray gives what a task raised to who asks for its result."""
    return RayTaskError("execute", "Traceback", cause).as_instanceof_cause()


def test_what_a_rank_raised_is_told_as_it_was_there() -> None:
    cause = _cause(WorkerGroupError("failed", {0: as_told(KeyError("exp_avg"))}))
    assert not _died(cause)
    with pytest.raises(TrainingFailed, match=r"^KeyError: 'exp_avg'$"):
        _reraise(cause)


def test_an_error_of_ours_wins_over_those_that_lost_the_rank_that_raised_it() -> None:
    lost = as_told(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"))
    cause = _cause(WorkerGroupError("failed", {0: lost, 1: as_told(ArtifactError("spoilt"))}))
    assert type(cause) is ArtifactError
    assert not _died(cause)
    with pytest.raises(WorkersError, match=r"^spoilt$"):
        _reraise(cause)


@pytest.mark.parametrize(
    "cause",
    [
        ActorDiedError(),
        as_told(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")),
        as_told(dist.DistNetworkError("the rank 0 was not reached")),
    ],
)
def test_a_rank_that_is_lost_is_a_reason_to_start_again(cause: Exception) -> None:
    assert _died(_cause(WorkerGroupError("failed", {0: cause})))
    assert _died(_cause(ControllerError(cause)))
