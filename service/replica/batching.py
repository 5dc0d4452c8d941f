"""The order of a continuous batch and what its requests share in the KV cache, by version.

Knows a request's version by its id alone.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import xor
from typing import Any

from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler


def request_id(version_id: str, number: int) -> str:
    return f"{version_id}/{number}"


def version_of(request_id: str) -> str:
    return request_id.partition("/")[0]


class VersionScheduler(FIFOScheduler):  # type: ignore[misc]  # untyped base
    """First in, first out; within a batch the requests of a version lie side by side.

    Requests of one version share the KV cache of a common beginning of their prompts; those of
    different versions never do.
    """

    NAME = "by version"

    def __init__(
        self, cache: Any, safety_margin: float | None, max_requests_per_batch: int
    ) -> None:
        super().__init__(cache, safety_margin, max_requests_per_batch)
        cache.search_prefix_match = _apart(cache.search_prefix_match)
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = _apart(allocator.mark_complete_blocks)

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[Any] | None, bool, int, int]:
        requests, *sizes = super().schedule_batch(token_budget, cache_budget)
        if requests:
            requests.sort(key=lambda request: version_of(request.state.request_id))
        return requests, *sizes


SCHEDULER_MAPPING[VersionScheduler.NAME] = VersionScheduler


def _apart(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the cache that takes a request's id and tokens, and hashes these in blocks.

    A block's hash covers the tokens before it, so other tokens at the start are another prompt.
    """

    def salted(request_id: str, tokens: Sequence[int], *rest: Any) -> Any:
        salt = _salt(version_of(request_id))
        start = map(xor, tokens, salt)
        return method(request_id, [*start, *tokens[len(salt) :]], *rest)

    return salted


@lru_cache(maxsize=1024)
def _salt(version_id: str) -> tuple[int, ...]:
    """Sixteen integers of 32 bits: no token ids of one version become those of another."""
    return tuple(array("i", hashlib.blake2b(version_id.encode()).digest()))
