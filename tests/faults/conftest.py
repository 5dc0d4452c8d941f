"""One real service for all that need one: its database and its version store can be taken away."""

from collections.abc import Iterator

import pytest

from tests.faults.site import Site


@pytest.fixture(scope="package")
def site() -> Iterator[Site]:
    """The service runs, with a finished job's version live."""
    with Site() as made:
        yield made
