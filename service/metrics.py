"""What the service measures: names, units, tags, and how each is recorded.

Ray's metrics: each process records, its node exports them to Prometheus as `ray_errata_…`. In a
process without Ray, recording does nothing. A tag's values are bounded: `version` by the versions
that exist, the others by lists here or in the code that records.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError
from ray.util.metrics import Counter, Gauge, Histogram

from service.errors import InvalidInput, NotFound, Unavailable, VersionRejected

TOKEN_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
SWAP_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]

_queries = Counter(
    "errata_queries",
    "Queries, by what became of them: answered, invalid, not_found, rejected, unavailable, "
    "given_up (by the client) or failed.",
    ("version", "outcome"),
)
_retries = Counter(
    "errata_query_retries",
    "Times that a query was given to another replica, because one refused or died.",
    ("reason",),
)
_prompt_tokens = Counter("errata_prompt_tokens", "Tokens of prompts answered.", ("version",))
_completion_tokens = Counter(
    "errata_completion_tokens", "Tokens of answers, complete ones only.", ("version",)
)
_first_token = Histogram(
    "errata_time_to_first_token_seconds",
    "From a query's arrival at a replica to the first piece of its answer.",
    TOKEN_S,
)
_gap = Histogram(
    "errata_inter_token_seconds", "Between two pieces of an answer, at the replica.", TOKEN_S
)
_stage = Histogram(
    "errata_stage_seconds", "To read, verify and load a version on a replica.", SWAP_S
)
_staged_bytes = Counter("errata_staged_bytes", "Size of the tensors loaded by replicas.")
_verification_failures = Counter(
    "errata_verification_failures", "Versions that a replica refused to load: a digest differs."
)
_resident = Gauge("errata_resident_versions", "Versions in a replica's memory, the base included.")
_resident_bytes = Gauge(
    "errata_resident_bytes", "Memory of a replica's resident versions, the base not included."
)
_fenced = Counter("errata_fenced_replicas", "Replicas that a rollout went on without.")
_commit = Histogram("errata_commit_seconds", "To commit a staged version: one transaction.", SWAP_S)
_rollout = Histogram(
    "errata_rollout_seconds",
    "From the start of staging to the end of a rollout: committed, rejected or given_up.",
    SWAP_S,
    ("outcome",),
)
_canary = Gauge("errata_canary_ratio", "Share of the queries that a canary version answers, 0-1.")

_OUTCOMES: dict[type[Exception], str] = {
    InvalidInput: "invalid",
    NotFound: "not_found",
    VersionRejected: "rejected",
    Unavailable: "unavailable",
}


def exporters() -> list[str]:
    """URLs at which the nodes of the cluster export what their processes recorded; blocks.

    Raises `Unavailable` if Ray does not say which nodes there are.
    """
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
    except RayError as error:
        raise Unavailable(f"Ray does not say which nodes there are: {error}") from error
    hosts = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in nodes]
    return [
        f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics"
        for host, port in hosts
    ]


@contextmanager
def query(version_id: str) -> Iterator[None]:
    """Counts one query by what becomes of the block."""
    outcome = "failed"
    try:
        yield
        outcome = "answered"
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "given_up"
        raise
    except Exception as error:
        outcome = next(
            (_OUTCOMES[kind] for kind in type(error).__mro__ if kind in _OUTCOMES), outcome
        )
        raise
    finally:
        _queries.inc(tags={"version": version_id, "outcome": outcome})


def retried(reason: str) -> None:
    """One more replica is asked, because one `refused` or `died`."""
    _retries.inc(tags={"reason": reason})


class Pace:
    """The pace of one answer: made when its query arrives, told of each piece."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._histogram = _first_token

    def piece(self) -> None:
        now = time.perf_counter()
        self._histogram.observe(now - self._since)
        self._since, self._histogram = now, _gap


def answered(version_id: str, prompt_tokens: int, completion_tokens: int) -> None:
    """A replica has given a whole answer."""
    tags = {"version": version_id}
    if prompt_tokens:
        _prompt_tokens.inc(prompt_tokens, tags)
    if completion_tokens:
        _completion_tokens.inc(completion_tokens, tags)


def staged(seconds: float, size_bytes: int) -> None:
    """A replica has loaded a version."""
    _stage.observe(seconds)
    if size_bytes:
        _staged_bytes.inc(size_bytes)


def verification_failed() -> None:
    """A replica has refused to load a version."""
    _verification_failures.inc()


def resident(versions: int, size_bytes: int) -> None:
    """What a replica holds now: versions, the base included, and the bytes of the others."""
    _resident.set(versions)
    _resident_bytes.set(size_bytes)


def fenced() -> None:
    """A replica was told that a rollout went on without it."""
    _fenced.inc()


def committed(seconds: float) -> None:
    """A version was committed; the transaction took so long."""
    _commit.observe(seconds)


def rollout_ended(outcome: str, seconds: float) -> None:
    """A rollout was `committed`, `rejected` or `given_up` so long after it began."""
    _rollout.observe(seconds, {"outcome": outcome})


def canary(ratio: float) -> None:
    """So large a share of the queries, 0 to 1, is answered by a canary version now."""
    _canary.set(ratio)
