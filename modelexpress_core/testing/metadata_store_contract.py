"""The contract of metadata stores: the rules that the server relies on, as tests that run against a real store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from uuid import uuid4

import attrs
import pytest

from modelexpress_core.contracts.metadata_store import (
    Listing,
    MetadataStore,
    NotPublisherError,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
)
from modelexpress_core.testing.contract import Contract

__all__ = ["MetadataStoreContract"]

_Run = Callable[[Callable[[MetadataStore], Awaitable[None]]], None]

_READY, _STALE = SourceStatus.READY, SourceStatus.STALE


def _source(source_id: str, worker_id: str, **changes: object) -> StoredSource:
    record = SourceRecord(source_id, worker_id, "model", status=_READY)
    return StoredSource(attrs.evolve(record, **changes), b"identity", b"worker")  # type: ignore[arg-type]  # fields


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
        """A function that opens the store; called within an event loop. The store may contain records of others."""
        raise NotImplementedError

    @pytest.fixture
    def run(self, open_store: Callable[[], MetadataStore]) -> _Run:
        """Open a store, run a scenario with it, and close it."""

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

    def test_what_was_published_is_found(self, run: _Run, source_id: str) -> None:
        """A published record is found with all its fields and bytes, and with the time of the store's clock."""
        published = _source(
            source_id,
            "a",
            worker_rank=3,
            accelerator="cuda:h100",
            topology={"rack": "r 1", "zone": "é"},
            training_step=2**63,
            layout_signature="l",
            source_load=0.5,
        )
        published = attrs.evolve(published, identity=bytes(range(256)), worker=b"\0" * 100_000)

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

    def test_what_was_not_published_is_not_found(self, run: _Run, source_id: str) -> None:
        """For an unknown record, get returns None, list nothing and update False, without an error."""

        async def scenario(store: MetadataStore) -> None:
            assert await store.get(source_id, "a") is None
            assert list((await store.list(SourceQuery(source_id=source_id))).records) == []
            assert not await store.update(source_id, "a", _READY, None, "")

        run(scenario)

    def test_publishing_again_replaces(self, run: _Run, source_id: str) -> None:
        """A second publication replaces the whole record and its index entries, as for a restarted worker."""

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
        """Filters by source, model and status work in every combination."""
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
                        # A shared store may contain other records.
                        ours = [each for each in listing.records if each.source_id in {source_id, other_id}]
                        assert expected == sorted(record.worker_id for record in ours)

        run(scenario)

    def test_updates(self, run: _Run, source_id: str) -> None:
        """An update changes status and time, and the load if it is given; nothing else."""

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
        """Only its publisher may update or replace a record; a record without a publisher belongs to all."""

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

    def test_silent_sources_become_stale_and_go(self, run: _Run, source_id: str) -> None:
        """Silent sources of any status become stale, later they are removed from every index; others stay."""
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

    def test_a_stale_source_that_speaks_is_ready_again(self, run: _Run, source_id: str) -> None:
        """A heartbeat makes a stale source ready again: its worker was only slow."""

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
        """Counts are by status, and follow changes of status."""

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
        """A leader stays leader while it renews in time; another can lead once it has stopped renewing."""

        async def scenario(store: MetadataStore) -> None:
            assert await store.lead(source_id, "first", 2.0)
            assert not await store.lead(source_id, "second", 2.0)
            assert await store.lead(f"{source_id}-other", "second", 2.0)
            await asyncio.sleep(1.0)
            assert await store.lead(source_id, "first", 2.0)
            await asyncio.sleep(1.2)
            assert not await store.lead(source_id, "second", 2.0)
            await asyncio.sleep(1.2)
            assert await store.lead(source_id, "second", 2.0)
            assert not await store.lead(source_id, "first", 2.0)

        run(scenario)

    def test_many_at_once(self, run: _Run, source_id: str) -> None:
        """Concurrent calls lose no record, and leave no stale index entry."""

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

    def test_check_succeeds(self, run: _Run) -> None:
        """``check`` of a reachable store raises nothing."""

        async def scenario(store: MetadataStore) -> None:
            await store.check()

        run(scenario)
