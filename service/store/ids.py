"""Sortable identifiers: `ed_` or `job_` and 26 characters of Crockford's base 32.

The first 48 bits are milliseconds since 1970 by the database's clock, whatever that of the node
says, the other 80 random (as in a ULID), so ids sort by the time they were made.
"""

import secrets
from typing import Literal

from sqlalchemy import BigInteger, cast, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LENGTH = 26
_last = 0


async def new_ids(
    conn: AsyncConnection, prefix: Literal["ed", "job"], count: int, *, after: str | None = None
) -> list[str]:
    """`count` ids, each greater than the ones this process made before, and than `after`.

    `after` is for an order that must hold even within a millisecond, or if the clock goes back.
    """
    global _last
    seconds = func.extract("epoch", func.clock_timestamp())
    query = select(cast(func.floor(seconds * 1000), BigInteger))
    now = int((await conn.execute(query)).scalar_one()) << 80 | secrets.randbits(80)
    first = max(now, _last + 1, 0 if after is None else _decode(after) + 1)
    _last = first + count - 1
    return [f"{prefix}_{_encode(first + offset)}" for offset in range(count)]


def _encode(value: int) -> str:
    return "".join(_ALPHABET[value >> 5 * place & 31] for place in reversed(range(_LENGTH)))


def _decode(made: str) -> int:
    value = 0
    for character in made.partition("_")[2]:
        value = value << 5 | _ALPHABET.index(character)
    return value
