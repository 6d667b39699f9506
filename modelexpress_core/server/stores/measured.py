"""A metadata store that measures the calls of another one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

from modelexpress_core.contracts.metadata_store import (
    LeaderLease,
    Listing,
    MetadataStore,
    Quota,
    Reaped,
    SourceQuery,
    StoredSource,
    StoreUnavailableError,
)
from modelexpress_core.server.metrics import ServerMetrics

__all__ = ["MeasuredStore"]


class MeasuredStore:
    """Passes each call on to ``store``, and records its duration or its failure.

    Args:
        store: The store that is measured.
        metrics: Metrics of the server.
    """

    def __init__(self, store: MetadataStore, metrics: ServerMetrics) -> None:
        self._store = store
        self._metrics = metrics

    async def publish(self, source: StoredSource, quota: Quota | None = None) -> None:
        """As the store."""
        with self._measured("publish"):
            await self._store.publish(source, quota)

    async def get(self, source_id: str, worker_id: str) -> StoredSource | None:
        """As the store."""
        with self._measured("get"):
            return await self._store.get(source_id, worker_id)

    async def list(self, query: SourceQuery) -> Listing:
        """As the store."""
        with self._measured("list"):
            return await self._store.list(query)

    async def update(
        self, source_id: str, worker_id: str, status: int, source_load: float | None, publisher: str
    ) -> bool:
        """As the store."""
        with self._measured("update"):
            return await self._store.update(source_id, worker_id, status, source_load, publisher)

    async def reap(self, stale_after_seconds: float, removed_after_seconds: float) -> Reaped:
        """As the store."""
        with self._measured("reap"):
            return await self._store.reap(stale_after_seconds, removed_after_seconds)

    async def counts(self) -> Mapping[int, int]:
        """As the store."""
        with self._measured("counts"):
            return await self._store.counts()

    async def lead(self, role: str, holder: str, seconds: float) -> LeaderLease | None:
        """As the store."""
        with self._measured("lead"):
            return await self._store.lead(role, holder, seconds)

    async def leader(self, role: str) -> LeaderLease | None:
        """As the store."""
        with self._measured("leader"):
            return await self._store.leader(role)

    async def check(self) -> None:
        """As the store."""
        with self._measured("check"):
            await self._store.check()

    async def close(self) -> None:
        """As the store."""
        await self._store.close()

    @contextlib.contextmanager
    def _measured(self, operation: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        except StoreUnavailableError:
            self._metrics.store_failed(operation)
            raise
        self._metrics.stored(operation, time.perf_counter() - begun)
