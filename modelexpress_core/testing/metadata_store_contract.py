"""The contract of every metadata store, as tests: exactly what ``contracts.metadata_store`` promises, and no more.

They use one store object, change each record through one call, and wait where a store without a clock has to wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from uuid import uuid4

import attrs
import pytest

from modelexpress_core.contracts.metadata_store import (
    LeaderLease,
    Listing,
    MetadataStore,
    NotPublisherError,
    Quota,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
    StoreFullError,
)
from modelexpress_core.testing.contract import Contract

__all__ = ["MetadataStoreContract"]

_Run = Callable[[Callable[[MetadataStore], Awaitable[None]]], None]

_READY, _STALE = SourceStatus.READY, SourceStatus.STALE


def _source(source_id: str, worker_id: str, **changes: object) -> StoredSource:
    record = SourceRecord(source_id, worker_id, "model", status=_READY)
    return StoredSource(attrs.evolve(record, **changes), b"identity", b"worker")  # type: ignore[arg-type]  # fields


#: How long the leases of the tests last, and how long the role may then take to change its holder.
_LEASE_SECONDS = 1.5
_TAKEOVER_SECONDS = 20.0


async def _next_lease(store: MetadataStore, role: str, holder: str, seconds: float) -> LeaderLease:
    """The lease, as soon as ``holder`` gets it."""
    deadline = time.monotonic() + _TAKEOVER_SECONDS
    while (lease := await store.lead(role, holder, seconds)) is None:
        assert time.monotonic() < deadline, f"the lease was not renewed, but {holder} does not get it"
        await asyncio.sleep(0.05)
    return lease


def _workers(listing: Listing) -> list[str]:
    return sorted(record.worker_id for record in listing.records)


class MetadataStoreContract(Contract, contract=True):
    """Inherit, and override the fixture ``open_store``.

    Example:
        >>> class TestOurs(MetadataStoreContract):
        ...     @pytest.fixture
        ...     def open_store(self):
        ...         return lambda: OurStore("localhost")
    """

    @pytest.fixture
    def open_store(self) -> Callable[[], MetadataStore]:
        """Opens the store; called in an event loop. The store may hold records of others."""
        raise NotImplementedError

    @pytest.fixture
    def run(self, open_store: Callable[[], MetadataStore]) -> _Run:
        """Opens the store, runs a scenario with it, and closes it."""

        def run(scenario: Callable[[MetadataStore], Awaitable[None]]) -> None:
            async def opened() -> None:
                store = open_store()
                try:
                    await scenario(store)
                finally:
                    await store.close()

            asyncio.run(opened())

        return run

    @pytest.fixture
    def source_id(self) -> str:
        """An id that no other test uses."""
        return uuid4().hex[:16]

    def test_a_published_source_is_found(self, run: _Run, source_id: str) -> None:
        """With all its fields and bytes, and times of the store's clock."""
        published = _source(
            source_id,
            "a",
            worker_rank=3,
            accelerator="cuda:h100",
            topology={"rack": "r 1", "zone": "é"},
            training_step=2**63,
            layout_signature="l",
            source_load=0.5,
            publisher="alice",
            publisher_address="2001:db8::1",
        )
        published = attrs.evolve(
            published, identity=bytes(range(256)), worker=b"\0" * 100_000, grant_key=bytes(range(255, 223, -1))
        )

        async def scenario(store: MetadataStore) -> None:
            await store.publish(published)
            found = await store.get(source_id, "a")
            listing = await store.list(SourceQuery(source_id=source_id))

            assert found is not None
            assert 0 <= found.as_of_ms - found.record.updated_at_ms < 10_000
            expected = attrs.evolve(published.record, updated_at_ms=found.record.updated_at_ms)
            assert attrs.evolve(published, record=expected, as_of_ms=found.as_of_ms) == found
            assert [expected] == list(listing.records)
            assert dict(published.record.topology) == dict(found.record.topology)
            assert found.as_of_ms <= listing.as_of_ms

        run(scenario)

    def test_an_unknown_source_is_not_found(self, run: _Run, source_id: str) -> None:
        """The answers are None, an empty list and False, not errors."""

        async def scenario(store: MetadataStore) -> None:
            assert await store.get(source_id, "a") is None
            assert list((await store.list(SourceQuery(source_id=source_id))).records) == []
            assert not await store.update(source_id, "a", _READY, None, "")

        run(scenario)

    def test_publishing_again_replaces(self, run: _Run, source_id: str) -> None:
        """All fields are replaced, so that nothing of an earlier process of the worker is left; indexes follow."""

        async def scenario(store: MetadataStore) -> None:
            await store.publish(_source(source_id, "a", model_name=f"old-{source_id}", source_load=0.5, worker_rank=1))
            await store.publish(_source(source_id, "a", model_name=f"new-{source_id}"))

            found = await store.get(source_id, "a")
            assert found is not None
            assert (found.record.worker_rank, found.record.source_load) == (0, None)
            assert _workers(await store.list(SourceQuery(model_name=f"old-{source_id}"))) == []
            assert _workers(await store.list(SourceQuery(model_name=f"new-{source_id}"))) == ["a"]

        run(scenario)

    def test_every_combination_of_filters(self, run: _Run, source_id: str) -> None:
        """By source, model and state, each alone, together, or not at all."""
        other_id = uuid4().hex[:16]
        model, other_model = f"m-{source_id}", f"n-{source_id}"
        sources = [
            _source(source_id, "a", model_name=model),
            _source(source_id, "b", model_name=model, status=_STALE),
            _source(other_id, "c", model_name=model),
            _source(other_id, "d", model_name=other_model),
        ]

        async def scenario(store: MetadataStore) -> None:
            for source in sources:
                await store.publish(source)
            for wanted_id in (None, source_id, other_id):
                for wanted_model in (None, model, other_model):
                    for status in (None, _READY, _STALE):
                        listing = await store.list(SourceQuery(wanted_id, wanted_model, status))
                        expected = [
                            source.record.worker_id
                            for source in sources
                            if wanted_id in {None, source.record.source_id}
                            and wanted_model in {None, source.record.model_name}
                            and status in {None, source.record.status}
                        ]
                        # A store that others use holds more records.
                        ours = [each for each in listing.records if each.source_id in {source_id, other_id}]
                        assert expected == sorted(record.worker_id for record in ours)

        run(scenario)

    def test_updates(self, run: _Run, source_id: str) -> None:
        """State and time change, the load if one is given, and nothing else."""

        async def scenario(store: MetadataStore) -> None:
            await store.publish(_source(source_id, "a", status=SourceStatus.INITIALIZING, accelerator="cuda"))
            before = await store.get(source_id, "a")
            await asyncio.sleep(0.02)

            assert await store.update(source_id, "a", _READY, 0.25, "")
            assert await store.update(source_id, "a", _READY, None, "")

            after = await store.get(source_id, "a")
            assert before is not None
            assert after is not None
            assert after.record.updated_at_ms > before.record.updated_at_ms
            time_ms = after.record.updated_at_ms
            expected = attrs.evolve(before.record, status=_READY, source_load=0.25, updated_at_ms=time_ms)
            assert expected == after.record
            assert _workers(await store.list(SourceQuery(source_id, status=_READY))) == ["a"]
            assert _workers(await store.list(SourceQuery(source_id, status=SourceStatus.INITIALIZING))) == []

        run(scenario)

    def test_a_record_belongs_to_its_publisher(self, run: _Run, source_id: str) -> None:
        """Another publisher can neither update nor replace it. A record without a publisher belongs to all."""

        async def scenario(store: MetadataStore) -> None:
            await store.publish(_source(source_id, "a", publisher="alice"))
            await store.publish(_source(source_id, "b"))

            with pytest.raises(NotPublisherError):
                await store.update(source_id, "a", _STALE, None, "bob")
            with pytest.raises(NotPublisherError):
                await store.publish(_source(source_id, "a", publisher="bob"))
            with pytest.raises(NotPublisherError):
                await store.publish(_source(source_id, "a"))
            assert await store.update(source_id, "a", _READY, None, "alice")
            await store.publish(_source(source_id, "b", publisher="bob"))
            found = await store.get(source_id, "a")
            assert found is not None
            assert (found.record.status, found.record.publisher) == (_READY, "alice")

        run(scenario)

    def test_a_quota_limits_the_bytes_of_an_owner(self, run: _Run, source_id: str) -> None:
        """And of all records. A record that is replaced counts no longer; a refused one changes nothing."""
        owner = f"owner-{source_id}"
        large = attrs.evolve(_source(source_id, "a"), worker=bytes(100_000))
        quota = Quota(owner, 150_000, 1 << 60)

        async def scenario(store: MetadataStore) -> None:
            await store.publish(large, quota)
            await store.publish(large, quota)
            with pytest.raises(StoreFullError) as refused:
                await store.publish(attrs.evolve(large, record=_source(source_id, "b").record), quota)
            assert refused.value.of_owner
            assert await store.get(source_id, "b") is None
            with pytest.raises(StoreFullError):
                await store.publish(attrs.evolve(large, worker=bytes(200_000)), quota)
            kept = await store.get(source_id, "a")
            assert kept is not None
            assert len(kept.worker) == 100_000
            await store.publish(
                attrs.evolve(large, record=_source(source_id, "c").record), Quota("x", 1 << 60, 1 << 60)
            )
            with pytest.raises(StoreFullError) as full:
                await store.publish(_source(source_id, "d"), Quota(f"{owner}-2", 1 << 60, 100_000))
            assert not full.value.of_owner

            await store.publish(_source(source_id, "a"), quota)
            await store.publish(attrs.evolve(large, record=_source(source_id, "b").record), quota)

            assert _workers(await store.list(SourceQuery(source_id))) == ["a", "b", "c"]

        run(scenario)

    def test_many_sources_are_listed(self, run: _Run, source_id: str) -> None:
        """More than a store may take at once."""
        names = sorted(f"worker-{number}" for number in range(1200))

        async def scenario(store: MetadataStore) -> None:
            await asyncio.gather(*(store.publish(_source(source_id, name)) for name in names))

            for query in (SourceQuery(source_id), SourceQuery(source_id, "model", _READY)):
                listing = await store.list(query)
                assert _workers(listing) == names
                assert listing.unreadable == 0

        run(scenario)

    def test_silent_sources_become_stale_and_are_removed(self, run: _Run, source_id: str) -> None:
        """In any state, unless they sent a heartbeat; stale ones are removed from every index."""
        states = [SourceStatus.UNKNOWN, SourceStatus.INITIALIZING, _READY]

        async def scenario(store: MetadataStore) -> None:
            for status in states:
                await store.publish(_source(source_id, status.name, status=status))
            await asyncio.sleep(1.2)
            await store.publish(_source(source_id, "fresh"))

            reaped = await store.reap(1.0, 3600)
            stale = _workers(await store.list(SourceQuery(source_id, status=_STALE)))
            again = await store.reap(3600, 3600)
            removed = await store.reap(3600, 1.0)
            left = _workers(await store.list(SourceQuery(source_id)))

            assert sorted(status.name for status in states) == stale
            assert reaped.stale >= len(states)
            assert reaped.removed == 0
            assert again.removed == 0
            assert removed.removed >= len(states)
            assert left == ["fresh"]
            assert await store.get(source_id, "READY") is None
            assert not await store.update(source_id, "READY", _READY, None, "")

        run(scenario)

    def test_a_heartbeat_ends_staleness(self, run: _Run, source_id: str) -> None:
        """The worker was only slow."""

        async def scenario(store: MetadataStore) -> None:
            await store.publish(_source(source_id, "a"))
            await asyncio.sleep(0.02)
            await store.reap(0.01, 3600)
            assert _workers(await store.list(SourceQuery(source_id, status=_STALE))) == ["a"]

            assert await store.update(source_id, "a", _READY, None, "")

            assert (await store.reap(3600, 3600)).removed == 0
            assert _workers(await store.list(SourceQuery(source_id, status=_READY))) == ["a"]

        run(scenario)

    def test_counts(self, run: _Run, source_id: str) -> None:
        """Sources are counted by state, and a change of state is counted."""

        async def scenario(store: MetadataStore) -> None:
            before = await store.counts()
            await store.publish(_source(source_id, "a"))
            await store.publish(_source(source_id, "b"))
            await store.update(source_id, "b", _STALE, None, "")
            after = await store.counts()

            assert after.get(_READY, 0) - before.get(_READY, 0) == 1
            assert after.get(_STALE, 0) - before.get(_STALE, 0) == 1

        run(scenario)

    def test_one_leads_at_a_time(self, run: _Run, source_id: str) -> None:
        """A holder keeps a role while it renews the lease, and for as long as the lease lasts after that."""
        role = f"role-{source_id}"

        async def scenario(store: MetadataStore) -> None:
            first = await store.lead(role, "first", _LEASE_SECONDS)
            assert first is not None
            assert (first.role, first.holder) == (role, "first")
            assert await store.lead(role, "second", _LEASE_SECONDS) is None
            assert await store.lead(f"{role}-other", "second", _LEASE_SECONDS) is not None
            await asyncio.sleep(_LEASE_SECONDS * 2 / 3)
            renewed = time.monotonic()
            assert await store.lead(role, "first", _LEASE_SECONDS) == first, "a renewal in time keeps the token"
            await asyncio.sleep(_LEASE_SECONDS * 2 / 3)
            assert await store.lead(role, "second", _LEASE_SECONDS) is None, "the lease was renewed"

            second = await _next_lease(store, role, "second", _LEASE_SECONDS)

            assert time.monotonic() - renewed >= _LEASE_SECONDS
            assert second.token > first.token
            assert await store.lead(role, "first", _LEASE_SECONDS) is None

        run(scenario)

    def test_others_see_who_leads(self, run: _Run, source_id: str) -> None:
        """The holder of a role is known to all, so that those who lost can ask it; nobody has a role that is free."""
        role = f"role-{source_id}"

        async def scenario(store: MetadataStore) -> None:
            assert await store.leader(role) is None
            first = await store.lead(role, "first", _LEASE_SECONDS)
            assert first is not None
            assert await store.leader(role) == first
            assert await store.lead(role, "second", _LEASE_SECONDS) is None
            assert await store.leader(role) == first, "who asks in vain does not become the leader"
            assert await store.leader(f"{role}-other") is None

            second = await _next_lease(store, role, "second", 60.0)

            assert await store.leader(role) == second

        run(scenario)

    def test_tokens_grow_with_each_holder(self, run: _Run, source_id: str) -> None:
        """Also when a former holder takes the role again: what was written with an older token can be refused."""
        role = f"role-{source_id}"

        async def scenario(store: MetadataStore) -> None:
            holders = ["a", "b", "a", "c"]
            leases = [await _next_lease(store, role, holder, 0.2) for holder in holders]

            tokens = [lease.token for lease in leases]
            assert holders == [lease.holder for lease in leases]
            assert sorted(set(tokens)) == tokens
            assert all(0 < token < 2**63 for token in tokens)

        run(scenario)

    def test_one_of_many_gets_the_lease(self, run: _Run, source_id: str) -> None:
        """Servers that ask at the same time do not both lead."""
        role = f"role-{source_id}"

        async def scenario(store: MetadataStore) -> None:
            names = [f"server-{number}" for number in range(20)]
            leases = await asyncio.gather(*(store.lead(role, name, 60.0) for name in names))

            [lease] = [lease for lease in leases if lease is not None]
            assert names[leases.index(lease)] == lease.holder

        run(scenario)

    def test_many_at_once(self, run: _Run, source_id: str) -> None:
        """Calls that overlap neither lose a record nor leave an index behind."""

        async def scenario(store: MetadataStore) -> None:
            names = [f"worker-{number}" for number in range(40)]
            await asyncio.gather(*(store.publish(_source(source_id, name)) for name in names))
            states: Sequence[SourceStatus] = [_READY if number % 2 else _STALE for number in range(40)]
            changes = zip(names, states, strict=True)
            await asyncio.gather(*(store.update(source_id, name, status, None, "") for name, status in changes))

            assert sorted(names) == _workers(await store.list(SourceQuery(source_id)))
            ready = _workers(await store.list(SourceQuery(source_id, status=_READY)))
            assert sorted(names[1::2]) == ready

        run(scenario)

    def test_an_open_store_answers(self, run: _Run) -> None:
        """``check`` returns."""

        async def scenario(store: MetadataStore) -> None:
            await store.check()

        run(scenario)
