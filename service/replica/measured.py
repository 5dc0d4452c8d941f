"""A source of versions whose reads are measured. Knows nothing of where they come from."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from service import metrics
from service.errors import VersionRejected
from service.replica.bank import Source

if TYPE_CHECKING:
    from torch import Tensor

    from workers.artifact import Manifest


class MeasuredSource:
    """See `Source`."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def manifest(self, version_id: str) -> "Manifest":
        with _verified():
            return self._source.manifest(version_id)

    def tensors(self, manifest: "Manifest") -> "Iterator[tuple[str, Tensor]]":
        """Staging has taken as long as this iterator was in use: the engine loads as it reads."""
        since = time.perf_counter()
        with _verified():
            yield from self._source.tensors(manifest)
        metrics.staged(time.perf_counter() - since, manifest.bytes)


@contextmanager
def _verified() -> Iterator[None]:
    try:
        yield
    except VersionRejected:
        metrics.verification_failed()
        raise
