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
    Quota,
    Reaped,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
    StoreFullError,
)
from modelexpress_core.server.clock import Clock
from modelexpress_core.server.pacing import Pacer

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
    spoke_at_ms: float  # by the steady clock
    source_load: float | None
    owner: str
    size_bytes: int
    _listed: SourceRecord | None = None  # made when it is asked for, and kept until the next heartbeat

    def record(self, wall_offset_ms: float) -> SourceRecord:
        """The record with the present state, its time by the wall clock."""
        updated_at_ms = int(self.spoke_at_ms + wall_offset_ms)
        listed = self._listed
        if listed is None or listed.updated_at_ms != updated_at_ms or listed.status != self.status:
            listed = self._listed = attrs.evolve(
                self.published.record,
                status=self.status,
                updated_at_ms=updated_at_ms,
                source_load=self.source_load,
            )
        return listed

    def changed(self) -> None:
        """Forget the record that was made for lists."""
        self._listed = None


@frozen
class _Role:
    """A lease, and the store's time at which it ends."""

    lease: LeaderLease
    until_ms: float


class MemoryStore:
    """Sources by id, with indexes by source, model and state.

    Args:
        clock: Steady clock in seconds, which nobody sets: it alone decides how long a worker has been silent.
        wall_clock: Seconds since 1970, for the times that answers show.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = Clock(clock, wall_clock)
        self._wall_clock = wall_clock
        self._owner_bytes: Counter[str] = Counter()
        self._total_bytes = 0
        self._sources: dict[_Key, _Kept] = {}
        self._by_source: defaultdict[str, set[_Key]] = defaultdict(set)
        self._by_model: defaultdict[str, set[_Key]] = defaultdict(set)
        self._by_status: defaultdict[int, set[_Key]] = defaultdict(set)
        self._roles: dict[str, _Role] = {}

    async def publish(self, source: StoredSource, quota: Quota | None = None) -> None:
        """Store ``source``, with the present time, in place of any record with the same ids."""
        record = source.record
        key = (record.source_id, record.worker_id)
        owner, size_bytes = "" if quota is None else quota.owner, source.size_bytes
        before = self._sources.get(key)
        if before is not None:
            _check_publisher(before, record.publisher)
        if quota is not None:
            self._check_quota(quota, size_bytes, before)
        if before is not None:
            self._remove(key)
        self._sources[key] = _Kept(source, record.status, self._clock.now_ms(), record.source_load, owner, size_bytes)
        self._owner_bytes[owner] += size_bytes
        self._total_bytes += size_bytes
        self._by_source[record.source_id].add(key)
        self._by_model[record.model_name].add(key)
        self._by_status[record.status].add(key)

    async def get(self, source_id: str, worker_id: str) -> StoredSource | None:
        """The source with these ids; None if there is none."""
        kept = self._sources.get((source_id, worker_id))
        if kept is None:
            return None
        offset = self._clock.offset_ms()
        return attrs.evolve(kept.published, record=kept.record(offset), as_of_ms=int(self._clock.now_ms() + offset))

    async def list(self, query: SourceQuery) -> Listing:
        """The sources that match ``query``."""
        offset = self._clock.offset_ms()
        records = []
        pacer = Pacer()
        for key in self._keys(query):
            await pacer.pause()
            kept = self._sources.get(key)  # None: removed meanwhile
            if (
                kept is not None
                and (query.model_name is None or kept.published.record.model_name == query.model_name)
                and (query.status is None or kept.status == query.status)
            ):
                records.append(kept.record(offset))
        return Listing(records, int(self._clock.now_ms() + offset))

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
        kept.spoke_at_ms = self._clock.now_ms()
        if source_load is not None:
            kept.source_load = source_load
        kept.changed()
        return True

    async def reap(self, stale_after_seconds: float, removed_after_seconds: float) -> Reaped:
        """Mark silent sources as stale, and remove stale sources that have been silent for longer."""
        now = self._clock.now_ms()
        stale = removed = 0
        pacer = Pacer()
        for key in [*self._by_status.get(SourceStatus.STALE, ())]:
            await pacer.pause()
            kept = self._sources.get(key)  # None: removed meanwhile
            if kept is None or kept.status != SourceStatus.STALE:
                continue
            if now - kept.spoke_at_ms >= removed_after_seconds * 1000:
                self._remove(key)
                removed += 1
        for status in [status for status in self._by_status if status != SourceStatus.STALE]:
            for key in [*self._by_status[status]]:
                await pacer.pause()
                kept = self._sources.get(key)
                if kept is None or kept.status != status:
                    continue
                if now - kept.spoke_at_ms >= stale_after_seconds * 1000:
                    self._set_status(key, kept, SourceStatus.STALE)
                    stale += 1
        return Reaped(stale, removed)

    async def counts(self) -> Mapping[int, int]:
        """The number of sources in each state."""
        return Counter({status: len(keys) for status, keys in self._by_status.items() if keys})

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        """Take or renew the lease of ``role``; None if another holder has it.

        Tokens begin with the wall clock's time in milliseconds, so that they also grow from one process to the next.
        """
        now = self._clock.now_ms()
        last = self._roles.get(role)
        lease = None if last is None else last.lease
        if last is None or lease is None or lease.holder != holder:
            if last is not None and now < last.until_ms:
                return None
            lease = LeaderLease(
                role, holder, max(int(self._wall_clock() * 1000), 0 if lease is None else lease.token) + 1
            )
        self._roles[role] = _Role(lease, now + seconds * 1000)
        return lease

    async def leader(self, role: str) -> LeaderLease | None:
        """The lease of the one that has ``role`` now; None if nobody has it."""
        last = self._roles.get(role)
        return None if last is None or self._clock.now_ms() >= last.until_ms else last.lease

    async def check(self) -> None:
        """Return: it always answers."""

    async def close(self) -> None:
        """Return: there is nothing to close."""

    def _check_quota(self, quota: Quota, size_bytes: int, before: _Kept | None) -> None:
        """Raise if a record of this size, in place of ``before``, exceeds the quota."""
        freed_bytes = 0 if before is None else before.size_bytes
        freed_of_owner_bytes = freed_bytes if before is not None and before.owner == quota.owner else 0
        if self._owner_bytes[quota.owner] - freed_of_owner_bytes + size_bytes > quota.owner_bytes:
            raise StoreFullError(of_owner=True)
        if self._total_bytes - freed_bytes + size_bytes > quota.total_bytes:
            raise StoreFullError(of_owner=False)

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
        self._total_bytes -= kept.size_bytes
        self._owner_bytes[kept.owner] -= kept.size_bytes
        if not self._owner_bytes[kept.owner]:
            del self._owner_bytes[kept.owner]
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
