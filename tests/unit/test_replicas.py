"""Of several replicas, one downloads a version, and the others learn which."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from modelexpress_core.contracts.metadata_store import LeaderLease, StoreUnavailableError
from modelexpress_core.server.replicas import Claim, Replicas
from modelexpress_core.server.stores.memory import MemoryStore


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def scene() -> None:
        await scenario()

    asyncio.run(scene())


def replica(store: MemoryStore, endpoint: str, *, seconds: float = 15.0) -> Replicas:
    return Replicas(store, endpoint, asyncio.get_running_loop(), seconds=seconds)


async def claim(replicas: Replicas, key: str = "org/name@1") -> Claim:
    return await asyncio.to_thread(replicas.claim, key)


def test_one_of_many_downloads() -> None:
    """All others are told its endpoint, and each version has its own role."""

    async def scenario() -> None:
        store = MemoryStore()
        all_replicas = [replica(store, f"host-{number}:8001") for number in range(8)]

        claims = await asyncio.gather(*(claim(each) for each in all_replicas))

        [own] = [each for each in claims if each.own]
        assert {each.holder for each in claims} == {own.holder}
        assert own.lasts()
        assert (await claim(all_replicas[3], "org/name@2")).own

    run(scenario)


def test_who_has_it_claims_it_again() -> None:
    """The token stays, so that a second claim takes nothing from the first."""

    async def scenario() -> None:
        one = replica(MemoryStore(), "a:8001")
        first = await claim(one)

        assert await claim(one) == first
        assert first.lasts()

    run(scenario)


def test_a_claim_is_kept() -> None:
    """It outlives its lease by far; once released, another gets it when the lease has ended."""

    async def scenario() -> None:
        clock = Clock()
        store = MemoryStore(clock)
        one, other = replica(store, "a:8001"), replica(store, "b:8001")
        first = await claim(one)
        for _ in range(10):
            clock.now += 10
            await one.once()
            assert first.lasts()
            assert not (await claim(other)).own

        one.release("org/name@1")
        clock.now += 10
        await one.once()
        assert (await claim(other)).holder == "a:8001", "its lease has not ended yet"
        clock.now += 6
        second = await claim(other)

        assert second.own
        assert second.token > first.token
        assert not first.lasts()

    run(scenario)


def test_a_replica_that_hangs_learns_that_it_lost() -> None:
    """With its next renewal."""

    async def scenario() -> None:
        clock = Clock()
        store = MemoryStore(clock)
        hanging, other = replica(store, "a:8001"), replica(store, "b:8001")
        first = await claim(hanging)
        clock.now += 16
        second = await claim(other)
        assert second.own

        await hanging.once()

        assert not first.lasts()
        assert second.lasts()
        assert (await claim(hanging)).holder == "b:8001"

    run(scenario)


def test_a_role_that_came_back_is_a_new_one() -> None:
    """Another had it in between, and may have begun a download: the first claim does not last."""

    async def scenario() -> None:
        clock = Clock()
        store = MemoryStore(clock)
        one, other = replica(store, "a:8001"), replica(store, "b:8001")
        first = await claim(one)
        clock.now += 16
        await claim(other)
        clock.now += 16

        await one.once()

        assert not first.lasts()
        again = await claim(one)
        assert again.own
        assert again.lasts()
        assert not first.lasts()

    run(scenario)


class _Silent(MemoryStore):
    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        message = "nobody listens"
        raise StoreUnavailableError(message)


class _Frozen(MemoryStore):
    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        await asyncio.Event().wait()
        return None


class _Hectic(MemoryStore):
    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        return None


@pytest.mark.parametrize("store", [_Silent, _Frozen, _Hectic])
def test_a_store_that_does_not_answer_is_an_error(store: type[MemoryStore]) -> None:
    """Nobody waits for ever, and nobody takes silence for consent."""

    async def scenario() -> None:
        with pytest.raises(StoreUnavailableError):
            await claim(replica(store(), "a:8001", seconds=0.3))

    run(scenario)
