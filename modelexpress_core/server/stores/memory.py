"""Metadata in this process, for one server: it ends with the process."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import attrs
from attrs import define, frozen

from modelexpress_core.contracts.metadata_store import (
    LeaderLease,
    Listing,
    NotPublisherError,
    Reaped,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
)

__all__ = ["MemoryStore"]

_Key = tuple[str, str]
_N = TypeVar("_N", int, str)


@define(eq=False)
class _Kept:
    """A source as it was published, and the fields that heartbeats change.

    Heartbeats change them in place. To make a new record for each heartbeat would take longer than the rest of the
    call, and the garbage collector would go through all sources every few seconds, while no call is answered.
    """

    published: StoredSource
    status: int
    updated_at_ms: int
    source_load: float | None

    def record(self) -> SourceRecord:
        """The record with the present state."""
        return attrs.evolve(
            self.published.record,
            status=self.status,
            updated_at_ms=self.updated_at_ms,
            source_load=self.source_load,
        )


@frozen
class _Role:
    """A lease, and the store's time at which it ends."""

    lease: LeaderLease
    until_ms: float


class MemoryStore:
    """Sources by id, with indexes by source, model and state.

    Args:
        clock: The store's clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._sources: dict[_Key, _Kept] = {}
        self._by_source: defaultdict[str, set[_Key]] = defaultdict(set)
        self._by_model: defaultdict[str, set[_Key]] = defaultdict(set)
        self._by_status: defaultdict[int, set[_Key]] = defaultdict(set)
        self._roles: dict[str, _Role] = {}

    async def publish(self, source: StoredSource) -> None:
        """Store ``source``, with the present time, in place of any record with the same ids."""
        record = source.record
        key = (record.source_id, record.worker_id)
        before = self._sources.get(key)
        if before is not None:
            _check_publisher(before, record.publisher)
            self._remove(key)
        self._sources[key] = _Kept(source, record.status, self._now_ms(), record.source_load)
        self._by_source[record.source_id].add(key)
        self._by_model[record.model_name].add(key)
        self._by_status[record.status].add(key)

    async def get(self, source_id: str, worker_id: str) -> StoredSource | None:
        """The source with these ids; None if there is none."""
        kept = self._sources.get((source_id, worker_id))
        if kept is None:
            return None
        return attrs.evolve(kept.published, record=kept.record(), as_of_ms=self._now_ms())

    async def list(self, query: SourceQuery) -> Listing:
        """The sources that match ``query``."""
        kept = (self._sources[key] for key in self._keys(query))
        wanted = [
            each.record()
            for each in kept
            if (query.model_name is None or each.published.record.model_name == query.model_name)
            and (query.status is None or each.status == query.status)
        ]
        return Listing(wanted, self._now_ms())

    async def update(
        self, source_id: str, worker_id: str, status: int, source_load: float | None, publisher: str
    ) -> bool:
        """Set the state, the time and the load of a source; whether there is such a source."""
        key = (source_id, worker_id)
        kept = self._sources.get(key)
        if kept is None:
            return False
        _check_publisher(kept, publisher)
        self._set_status(key, kept, status)
        kept.updated_at_ms = self._now_ms()
        if source_load is not None:
            kept.source_load = source_load
        return True

    async def reap(self, stale_after_seconds: float, removed_after_seconds: float) -> Reaped:
        """Mark silent sources as stale, and remove stale sources that have been silent for longer."""
        now = self._now_ms()
        stale = removed = 0
        for key in [*self._by_status.get(SourceStatus.STALE, ())]:
            if now - self._sources[key].updated_at_ms >= removed_after_seconds * 1000:
                self._remove(key)
                removed += 1
        for status in [status for status in self._by_status if status != SourceStatus.STALE]:
            for key in [*self._by_status[status]]:
                kept = self._sources[key]
                if now - kept.updated_at_ms >= stale_after_seconds * 1000:
                    self._set_status(key, kept, SourceStatus.STALE)
                    stale += 1
        return Reaped(stale, removed)

    async def counts(self) -> Mapping[int, int]:
        """The number of sources in each state."""
        return Counter({status: len(keys) for status, keys in self._by_status.items() if keys})

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        """Take or renew the lease of ``role``; None if another holder has it.

        Tokens begin with the time in milliseconds, so that they also grow from one process to the next.
        """
        now = self._clock() * 1000
        last = self._roles.get(role)
        lease = None if last is None else last.lease
        if last is None or lease is None or lease.holder != holder:
            if last is not None and now < last.until_ms:
                return None
            lease = LeaderLease(role, holder, max(int(now), 0 if lease is None else lease.token) + 1)
        self._roles[role] = _Role(lease, now + seconds * 1000)
        return lease

    async def check(self) -> None:
        """Return: it always answers."""

    async def close(self) -> None:
        """Return: there is nothing to close."""

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _keys(self, query: SourceQuery) -> Sequence[_Key]:
        if query.source_id is not None:
            return [*self._by_source.get(query.source_id, ())]
        if query.model_name is not None:
            return [*self._by_model.get(query.model_name, ())]
        if query.status is not None:
            return [*self._by_status.get(query.status, ())]
        return [*self._sources]

    def _set_status(self, key: _Key, kept: _Kept, status: int) -> None:
        if status != kept.status:
            self._drop(self._by_status, kept.status, key)
            self._by_status[status].add(key)
            kept.status = status

    def _remove(self, key: _Key) -> None:
        kept = self._sources.pop(key)
        record = kept.published.record
        self._drop(self._by_source, record.source_id, key)
        self._drop(self._by_model, record.model_name, key)
        self._drop(self._by_status, kept.status, key)

    @staticmethod
    def _drop(index: defaultdict[_N, set[_Key]], name: _N, key: _Key) -> None:
        index[name].discard(key)
        if not index[name]:
            del index[name]


def _check_publisher(kept: _Kept, publisher: str) -> None:
    if kept.published.record.publisher not in {"", publisher}:
        raise NotPublisherError(kept.published.record.worker_id)
