"""Metadata in this process keeps to the contract of metadata stores, and the contract finds stores that break it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import attrs
import pytest

from modelexpress_core.contracts.metadata_store import LeaderLease, MetadataStore
from modelexpress_core.server.stores.memory import MemoryStore
from modelexpress_core.testing import MetadataStoreContract


class TestMemoryStore(MetadataStoreContract):
    @pytest.fixture
    def open_store(self) -> Callable[[], MetadataStore]:
        return MemoryStore


def test_tokens_grow_from_one_process_to_the_next() -> None:
    """Writers outside may still hold a token of a server that has ended."""

    async def token() -> int:
        lease = await MemoryStore().lead("role", "holder", 1.0)
        assert lease is not None
        return lease.token

    first = asyncio.run(token())
    asyncio.run(asyncio.sleep(0.002))
    assert first < asyncio.run(token())


def test_a_clock_that_is_set_back_takes_no_token_back() -> None:
    """The next holder does not wait for it, and gets a larger token."""
    now, steady = 1000.0, 0.0
    store = MemoryStore(clock=lambda: steady, wall_clock=lambda: now)

    def lead(holder: str) -> LeaderLease | None:
        return asyncio.run(store.lead("role", holder, 1.0))

    first = lead("a")
    now = 500.0
    steady = 0.9
    waiting = lead("b")
    steady = 1.0
    second = lead("b")

    assert waiting is None
    assert first is not None
    assert second is not None
    assert first.token < second.token


class _EveryoneLeads(MemoryStore):
    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        return LeaderLease(role, holder, 1)


class _ForgetsTokens(MemoryStore):
    """Counts from 1 whenever a lease has expired."""

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        lease = await super().lead(role, holder, seconds)
        return None if lease is None else attrs.evolve(lease, token=1)


class _NewTokenAtEachCall(MemoryStore):
    _calls = 0

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        self._calls += 1
        lease = await super().lead(role, holder, seconds)
        return None if lease is None else attrs.evolve(lease, token=self._calls)


class _DoesNotRenew(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self._granted: dict[tuple[str, str], LeaderLease] = {}

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        known = self._granted.pop((role, holder), None)
        if known is not None:
            return known
        lease = await super().lead(role, holder, seconds)
        if lease is not None:
            self._granted[role, holder] = lease
        return lease


class _NeverExpires(MemoryStore):
    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        return await super().lead(role, holder, 1e9)


class _OneRoleForAll(MemoryStore):
    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        lease = await super().lead("the role", holder, seconds)
        return None if lease is None else attrs.evolve(lease, role=role)


class _NamesTheLastToAsk(MemoryStore):
    _last = ""

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        self._last = holder
        return await super().lead(role, holder, seconds)

    async def leader(self, role: str) -> LeaderLease | None:
        lease = await super().leader(role)
        return None if lease is None else attrs.evolve(lease, holder=self._last)


class _AsksFirst(MemoryStore):
    """Looks, waits, and writes what it decided before it waited."""

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        known = self._roles.get(role)
        await asyncio.sleep(0)
        if known is None:
            self._roles.pop(role, None)
        return await super().lead(role, holder, seconds)


def _run(store: type[MemoryStore]) -> Callable[[Callable[[MetadataStore], Awaitable[None]]], None]:
    async def scene(scenario: Callable[[MetadataStore], Awaitable[None]]) -> None:
        await scenario(store())

    return lambda scenario: asyncio.run(scene(scenario))


@pytest.mark.parametrize(
    ("store", "rule"),
    [
        (_EveryoneLeads, "test_one_leads_at_a_time"),
        (_NamesTheLastToAsk, "test_others_see_who_leads"),
        (_EveryoneLeads, "test_one_of_many_gets_the_lease"),
        (_ForgetsTokens, "test_tokens_grow_with_each_holder"),
        (_NewTokenAtEachCall, "test_one_leads_at_a_time"),
        (_DoesNotRenew, "test_one_leads_at_a_time"),
        (_NeverExpires, "test_tokens_grow_with_each_holder"),
        (_OneRoleForAll, "test_one_leads_at_a_time"),
        (_AsksFirst, "test_one_of_many_gets_the_lease"),
    ],
)
def test_the_contract_finds_wrong_leases(store: type[MemoryStore], rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these stores breaks one promise."""
    monkeypatch.setattr("modelexpress_core.testing.metadata_store_contract._TAKEOVER_SECONDS", 1.0)
    contract = TestMemoryStore()

    with pytest.raises((AssertionError, ValueError)):
        getattr(contract, rule)(_run(store), "a1b2")
