"""Files with one JSON object a line. Torch-free; knows nothing of what the objects mean."""

import json
from pathlib import Path
from typing import Any

from workers.errors import BadLine


def numbered(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file with their line numbers; raises `BadLine` naming the bad line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadLine(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(item, dict):
            raise BadLine(f"{path}, line {number}: an object was expected")
        found.append((number, item))
    return found
