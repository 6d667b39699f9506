"""Metadata in this process: for one server, and lost with it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import attrs

from modelexpress_core.server.stores.protocol import (
    Listing,
    NotPublisherError,
    Reaped,
    SourceQuery,
    SourceStatus,
    StoredSource,
)

__all__ = ["MemoryStore"]

_Key = tuple[str, str]


class MemoryStore:
    """Sources by id, with indexes by source and by model.

    Args:
        clock: Seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._sources: dict[_Key, StoredSource] = {}
        self._by_source: defaultdict[str, set[_Key]] = defaultdict(set)
        self._by_model: defaultdict[str, set[_Key]] = defaultdict(set)
        self._by_status: defaultdict[int, set[_Key]] = defaultdict(set)
        self._roles: dict[str, tuple[str, float]] = {}

    async def publish(self, source: StoredSource) -> None:
        """Keep ``source`` in place of what was there under its ids, as of now."""
        key = (source.record.source_id, source.record.worker_id)
        self._check_publisher(key, source.record.publisher)
        self._put(key, attrs.evolve(source, record=attrs.evolve(source.record, updated_at_ms=self._now_ms())))

    async def get(self, source_id: str, worker_id: str) -> StoredSource | None:
        """The source with these ids, if there is one."""
        source = self._sources.get((source_id, worker_id))
        return None if source is None else attrs.evolve(source, as_of_ms=self._now_ms())

    async def list(self, query: SourceQuery) -> Listing:
        """The sources that ``query`` asks for."""
        records = (self._sources[key].record for key in self._keys(query))
        wanted = [
            record
            for record in records
            if (query.model_name is None or record.model_name == query.model_name)
            and (query.status is None or record.status == query.status)
        ]
        return Listing(wanted, self._now_ms())

    async def update(
        self, source_id: str, worker_id: str, status: int, source_load: float | None, publisher: str
    ) -> bool:
        """Set the state of a source, as of now; False where there is no such source."""
        key = (source_id, worker_id)
        source = self._sources.get(key)
        if source is None:
            return False
        self._check_publisher(key, publisher)
        load = source.record.source_load if source_load is None else source_load
        self._change(key, status=status, source_load=load, updated_at_ms=self._now_ms())
        return True

    async def reap(self, stale_after_seconds: float, removed_after_seconds: float) -> Reaped:
        """Make sources stale whose worker has been silent so long, and remove stale ones after so long a silence."""
        now = self._now_ms()
        stale = removed = 0
        for key in [*self._by_status[SourceStatus.STALE]]:
            if now - self._sources[key].record.updated_at_ms >= removed_after_seconds * 1000:
                self._remove(key)
                removed += 1
        for status in [status for status in self._by_status if status != SourceStatus.STALE]:
            for key in [*self._by_status[status]]:
                if now - self._sources[key].record.updated_at_ms >= stale_after_seconds * 1000:
                    self._change(key, status=SourceStatus.STALE)
                    stale += 1
        return Reaped(stale, removed)

    async def counts(self) -> Mapping[int, int]:
        """How many sources are in each state."""
        return Counter({status: len(keys) for status, keys in self._by_status.items() if keys})

    async def lead(self, role: str, holder: str, seconds: float) -> bool:
        """Whether ``holder`` has ``role`` for the next ``seconds``."""
        now = self._clock()
        other, until = self._roles.get(role, (holder, now))
        if other != holder and now < until:
            return False
        self._roles[role] = (holder, now + seconds)
        return True

    async def check(self) -> None:
        """It can always be asked."""

    async def close(self) -> None:
        """It holds nothing open."""

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

    def _check_publisher(self, key: _Key, publisher: str) -> None:
        source = self._sources.get(key)
        if source is not None and source.record.publisher not in {"", publisher}:
            raise NotPublisherError(key[1])

    def _change(self, key: _Key, **changes: object) -> None:
        source = self._sources[key]
        self._put(key, attrs.evolve(source, record=attrs.evolve(source.record, **changes)))  # type: ignore[arg-type]  # fields of the record

    def _put(self, key: _Key, source: StoredSource) -> None:
        before = self._sources.get(key)
        if before is not None:
            self._by_status[before.record.status].discard(key)
            if before.record.model_name != source.record.model_name:
                self._drop(self._by_model, before.record.model_name, key)
        self._sources[key] = source
        self._by_source[key[0]].add(key)
        self._by_model[source.record.model_name].add(key)
        self._by_status[source.record.status].add(key)

    def _remove(self, key: _Key) -> None:
        record = self._sources.pop(key).record
        self._drop(self._by_source, record.source_id, key)
        self._drop(self._by_model, record.model_name, key)
        self._by_status[record.status].discard(key)

    @staticmethod
    def _drop(index: defaultdict[str, set[_Key]], name: str, key: _Key) -> None:
        index[name].discard(key)
        if not index[name]:
            del index[name]
