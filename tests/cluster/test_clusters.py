"""Two Ray clusters over one PostgreSQL and one version store, as during an upgrade: one leads.

`ERRATA_TEST_SEED` sets the order of the faults, `ERRATA_TEST_SECONDS` how long there are any.
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import pytest

from service.store.migrate import upgrade
from tests.cluster.pair import Pair
from tests.cluster.stores import Stores

SEED = int(os.environ.get("ERRATA_TEST_SEED", "1"))
SECONDS = float(os.environ.get("ERRATA_TEST_SECONDS", "300"))


@pytest.fixture
def stores() -> Iterator[Stores]:
    with Stores() as made:
        yield made


def test_one_leads_and_both_serve_what_is_committed(stores: Stores) -> None:
    upgrade(stores.postgres.url)
    pair = Pair(stores, SEED)
    asyncio.run(pair.run(SECONDS))
    print(f"\nseed {SEED}: {pair.figures}")
    pair.check()
    assert pair.figures.jobs_done > 0
    assert pair.figures.leaders == {"blue", "green"}

    texts = defaultdict(set)
    for address in pair.addresses:
        print(f"told at {address}: {dict(pair.watch.outcomes(address, 0.0))}")
        told = pair.watch.answers(address)
        for one, after in pairwise(told):
            assert one.generation <= after.generation
        for one in told:
            texts[one.version].add(one.text)
    assert all(len(each) == 1 for each in texts.values()), texts
