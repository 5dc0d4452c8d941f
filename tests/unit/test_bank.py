"""Residency rules, with real artifacts in a real version store and an engine without a model."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import NotFound, Unavailable, VersionRejected, VersionUnavailable
from service.replica.bank import VersionBank
from service.replica.echo import EchoEngine
from tests.tiny_model import BYTES, TUNED, publish, stored, tuned_tensor

FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = str(tmp_path_factory.mktemp("store"))
    for number in range(1, 6):
        publish(store, f"v{number}", FINGERPRINT)
    return store


def with_bank(
    store: str,
    work: Callable[[EchoEngine, VersionBank], Awaitable[Any]],
    capacity: int = 2,
    capacity_bytes: int | None = None,
) -> Any:
    async def main() -> Any:
        engine = EchoEngine()
        bank = VersionBank(
            engine,
            stored(store, FINGERPRINT),
            FINGERPRINT,
            capacity=capacity,
            capacity_bytes=capacity_bytes,
        )
        return await work(engine, bank)

    return asyncio.run(main())


def test_ensure_stages_what_was_published(published: str) -> None:
    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        digest = await bank.ensure("v1")
        assert digest == publish(published + "x", "v1", FINGERPRINT).digest
        assert torch.equal(engine.staged["v1"][TUNED], tuned_tensor(1))

    with_bank(published, work)


def test_the_base_is_always_there(published: str) -> None:
    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        assert await bank.ensure("v0") == FINGERPRINT
        for number in range(1, 6):
            await bank.ensure(f"v{number}")
        assert "v0" in bank.resident
        assert engine.stagings == ["v1", "v2", "v3", "v4", "v5"]

    with_bank(published, work)


def test_concurrent_requests_stage_once(published: str) -> None:
    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        await asyncio.gather(*(bank.ensure("v1") for _ in range(20)))
        assert engine.stagings == ["v1"]

    with_bank(published, work)


def test_one_waiter_giving_up_does_not_stop_the_others(published: str) -> None:
    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        first = asyncio.create_task(bank.ensure("v1"))
        second = asyncio.create_task(bank.ensure("v1"))
        await asyncio.sleep(0)
        first.cancel()
        assert await second
        assert first.cancelled()
        assert engine.stagings == ["v1"]

    with_bank(published, work)


def test_the_least_recently_used_goes_first(published: str) -> None:
    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        for version_id in ("v1", "v2", "v1", "v3"):
            await bank.ensure(version_id)
        assert set(bank.resident) == {"v0", "v1", "v3"} == set(engine.staged)

    with_bank(published, work)


def test_bytes_are_bounded_too(published: str) -> None:
    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        for version_id in ("v1", "v2", "v1", "v3"):
            await bank.ensure(version_id)
            assert bank.resident_bytes <= 2 * BYTES
        assert set(bank.resident) == {"v0", "v1", "v3"} == set(engine.staged)
        assert (bank.digest("v2"), bank.digest("v3")) == (None, await bank.ensure("v3"))

    with_bank(published, work, capacity=5, capacity_bytes=2 * BYTES + 1)


def test_a_version_larger_than_all_the_memory_is_taken_in_only_if_pinned(published: str) -> None:
    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        with pytest.raises(VersionUnavailable, match=f"{BYTES:,} bytes.*{BYTES - 1:,} bytes"):
            await bank.ensure("v1")
        await bank.pin(["v1"])
        assert await bank.ensure("v1")

    with_bank(published, work, capacity_bytes=BYTES - 1)


def test_pinned_versions_stay(published: str) -> None:
    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        await bank.pin(["v1"])
        for version_id in ("v1", "v2", "v3", "v4"):
            await bank.ensure(version_id)
        assert set(bank.resident) == {"v0", "v1", "v4"}
        await bank.pin(["v4"])
        await bank.ensure("v5")
        assert set(bank.resident) == {"v0", "v4", "v5"}

    with_bank(published, work)


def test_versions_in_flight_stay_and_the_bank_is_bounded(published: str) -> None:
    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        async with AsyncExitStack() as flights:
            for version_id in ("v1", "v2", "v2"):
                await flights.enter_async_context(bank.use(version_id))
            assert bank.in_flight("v2") == 2
            with pytest.raises(Unavailable, match=r"v3 .* cannot be staged now: a replica holds 2"):
                await bank.ensure("v3")
            assert set(bank.resident) == {"v0", "v1", "v2"}
        assert await bank.ensure("v3")
        assert set(bank.resident) == {"v0", "v2", "v3"}

    with_bank(published, work)


def test_a_pinned_version_gets_in_over_flights_and_the_bank_shrinks_after(published: str) -> None:
    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        async with bank.use("v1"), bank.use("v2"):
            await bank.pin(["v3"])
            await bank.ensure("v3")
            assert set(bank.resident) == {"v0", "v1", "v2", "v3"}
        assert len(bank.resident) == 3
        assert "v3" in bank.resident

    with_bank(published, work)


def test_many_versions_asked_at_once_never_exceed_the_places(published: str) -> None:
    async def one(bank: VersionBank, version_id: str) -> str:
        try:
            async with bank.use(version_id):
                assert len(bank.resident) <= 3
                await asyncio.sleep(0)
        except Unavailable:
            return "unavailable"
        return "answered"

    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        asked = (one(bank, f"v{1 + n % 5}") for n in range(50))
        outcomes = await asyncio.gather(*asked)
        assert "answered" in outcomes
        assert set(bank.resident) == set(engine.staged)
        assert len(bank.resident) <= 3

    with_bank(published, work)


def test_an_unpublished_version_is_not_found(published: str) -> None:
    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        with pytest.raises(NotFound, match="v99"):
            await bank.ensure("v99")

    with_bank(published, work)


def test_a_version_of_another_base_is_rejected(tmp_path: Path) -> None:
    publish(str(tmp_path), "v1", "0" * 64)

    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        with pytest.raises(VersionRejected, match="base model 0000"):
            await bank.ensure("v1")

    with_bank(str(tmp_path), work)


def test_a_flipped_bit_is_rejected_by_name_and_the_others_stay(
    published: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(published, store)
    shard = sorted((store / "versions" / "v2").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)

    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        await bank.ensure("v1")
        with pytest.raises(
            VersionRejected, match=rf"{shard.name}.*sha256 \w{{64}}, found \w{{64}}"
        ):
            await bank.ensure("v2")
        assert set(bank.resident) == {"v0", "v1"} == set(engine.staged)
        shard.write_bytes(bytes(content[:-1]) + bytes([content[-1] ^ 1]))
        assert await bank.ensure("v2")

    with_bank(str(store), work)


def test_a_store_that_cannot_be_read_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "versions").write_text("not a folder")

    async def work(engine: EchoEngine, bank: VersionBank) -> None:
        with pytest.raises(Unavailable, match="version store"):
            await bank.ensure("v1")

    with_bank(str(tmp_path), work)
