"""Marks sources of silent workers as stale, and removes those that have been stale for long."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

from modelexpress_core.contracts.metadata_store import LeaderLease, MetadataStore, StoreUnavailableError
from modelexpress_core.server.metrics import ServerMetrics

__all__ = ["Reaper"]

_log = logging.getLogger(__name__)

_ROLE = "reaper"

#: How long a lease lasts, in intervals: the next run renews it; if the server is lost, another takes over soon.
_LEASE_INTERVALS = 2.5


class Reaper:
    """Reaps at intervals. Of several servers that share a store, the leader alone does.

    Args:
        store: The store to reap.
        metrics: Metrics of the server.
        stale_after_seconds: Seconds without a heartbeat after which a source is stale.
        removed_after_seconds: Seconds without a heartbeat after which a stale source is removed.
        interval_seconds: Seconds from one run to the next.
    """

    def __init__(
        self,
        store: MetadataStore,
        metrics: ServerMetrics,
        *,
        stale_after_seconds: float,
        removed_after_seconds: float,
        interval_seconds: float,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._stale_after_seconds = stale_after_seconds
        self._removed_after_seconds = removed_after_seconds
        self._interval_seconds = interval_seconds
        self._name = uuid.uuid4().hex
        self._lease: LeaderLease | None = None

    async def run(self) -> None:
        """Run at intervals until cancelled. If the store does not answer, the next run asks it again."""
        while True:
            await asyncio.sleep(self._interval_seconds)
            try:
                await self.once()
            except StoreUnavailableError as exc:
                _log.warning("silent sources cannot be looked for: %s", exc)
            except Exception:  # noqa: BLE001 - of a plugin's store, say; the next run may succeed
                _log.exception("looking for silent sources failed")

    async def once(self) -> None:
        """Reap, unless another server leads.

        Reaping needs no fencing: whether a source is silent is checked for each record as it is changed, so a leader
        that has lost its lease does no harm.
        """
        lease = await self._store.lead(_ROLE, self._name, _LEASE_INTERVALS * self._interval_seconds)
        if lease != self._lease:
            self._lease = lease
            _log.debug("this server %s", "reaps no more" if lease is None else f"reaps, with the token {lease.token}")
        if lease is None:
            return
        begun = time.perf_counter()
        reaped = await self._store.reap(self._stale_after_seconds, self._removed_after_seconds)
        self._metrics.reaped(reaped, time.perf_counter() - begun)
        if reaped.stale or reaped.removed:
            _log.info("%d sources became stale, %d were removed", reaped.stale, reaped.removed)
