"""Opaque page cursors: the id of the last item of a page, not to be read by clients."""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import TypeVar

from service.errors import FieldError, InvalidInput

Item = TypeVar("Item")
_ID = re.compile(r"[A-Za-z0-9_]{1,64}")


def encode(last_id: str) -> str:
    return base64.urlsafe_b64encode(last_id.encode()).decode().rstrip("=")


def decode(cursor: str) -> str:
    """The id a page ended with; `InvalidInput` for what no page ever returned."""
    try:
        last_id = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise _invalid() from error
    if not _ID.fullmatch(last_id) or encode(last_id) != cursor:
        raise _invalid()
    return last_id


def split(found: Sequence[Item], ids: Sequence[str], limit: int) -> tuple[list[Item], str | None]:
    """A page and its next cursor, from up to `limit + 1` items and their ids."""
    if len(found) <= limit:
        return list(found), None
    return list(found[:limit]), encode(ids[limit - 1])


def _invalid() -> InvalidInput:
    message = "not a cursor of this list; pass the next_cursor of the page before, or none"
    return InvalidInput(f"cursor: {message}", (FieldError("cursor", message),))
