"""When a job starts by itself. Knows numbers only; no I/O."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Policy:
    """A job starts after so many queued edits or so many seconds of waiting, whichever is first."""

    after_edits: int | None
    after_s: float | None

    def due(self, queued: int, oldest_age: timedelta | None) -> bool:
        """Whether `queued` edits, the oldest of them waiting for `oldest_age`, want a job now."""
        if queued == 0 or oldest_age is None:
            return False
        enough = self.after_edits is not None and queued >= self.after_edits
        waited = self.after_s is not None and oldest_age.total_seconds() >= self.after_s
        return enough or waited
