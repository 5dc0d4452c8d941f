"""Sortable identifiers: `ed_` or `job_` and 26 characters of Crockford's base 32.

The first 48 bits are milliseconds since 1970, the other 80 random (as in a ULID), so ids sort by
the time they were made. Within one process they only grow.
"""

import secrets
import threading
import time
from typing import Literal

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LENGTH = 26
_lock = threading.Lock()
_last = 0


def new_ids(prefix: Literal["ed", "job"], count: int) -> list[str]:
    """`count` ids, each greater than every id this process made before."""
    global _last
    with _lock:
        now = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
        first = max(now, _last + 1)
        _last = first + count
    return [f"{prefix}_{_encode(first + offset)}" for offset in range(count)]


def _encode(value: int) -> str:
    return "".join(_ALPHABET[value >> 5 * place & 31] for place in reversed(range(_LENGTH)))
