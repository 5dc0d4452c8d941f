"""A search's finished trials, in a directory, so that it can go on where it ended. Torch-free."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.errors import WorkersError
from workers.location_choice import Outcome, Trial


class OtherSearch(WorkersError):
    """The directory holds the outcomes of a search with other settings."""


class LocationLog:
    """`search.json`, what the figures depend on, and `locations.jsonl`, an outcome a line."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises `OtherSearch`, naming the settings, if what is there was found with others."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "locations.jsonl"
        _check(folder, settings)
        self.outcomes: dict[Trial, Outcome] = {}
        for outcome in _read(self._file):
            self.outcomes[outcome.trial] = outcome

    def add(self, outcome: Outcome) -> None:
        """Durable when it returns."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(outcome.model_dump_json() + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.outcomes[outcome.trial] = outcome


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    file = folder / "search.json"
    if not file.exists():
        unfinished = file.with_suffix(".partial")
        unfinished.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(file)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        said = ", ".join(f"{n} {before.get(n)!r} (now {settings.get(n)!r})" for n in names)
        raise OtherSearch(
            f"{folder} holds a search with other settings: {said}; "
            "choose another --output, or remove that directory"
        )


def _read(file: Path) -> list[Outcome]:
    """Cuts off a last line whose writing was interrupted."""
    if not file.exists():
        return []
    payload = file.read_bytes()
    whole = payload[: payload.rfind(b"\n") + 1]
    if len(whole) < len(payload):
        os.truncate(file, len(whole))
    return [Outcome.model_validate_json(line) for line in whole.splitlines()]
