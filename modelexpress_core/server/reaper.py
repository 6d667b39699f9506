"""Finds sources whose worker has been silent, and says so; removes what has been stale for long."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

from modelexpress_core.contracts.metadata_store import MetadataStore, StoreUnavailableError
from modelexpress_core.server.metrics import ServerMetrics

__all__ = ["Reaper"]

_log = logging.getLogger(__name__)

_ROLE = "reaper"


class Reaper:
    """Of several servers that share a store, one reaps at a time.

    Args:
        store: What is gone through.
        metrics: Where it is counted.
        stale_after_seconds: Silence after which a source is stale.
        removed_after_seconds: Silence after which a stale source is removed.
        interval_seconds: How often.
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

    async def run(self) -> None:
        """Until it is cancelled. A store that cannot be asked is asked again the next time."""
        while True:
            await asyncio.sleep(self._interval_seconds)
            try:
                await self.once()
            except StoreUnavailableError as exc:
                _log.warning("silent sources cannot be looked for: %s", exc)
            except Exception:  # noqa: BLE001 - of a plugin's store, say; the next turn may go well
                _log.exception("looking for silent sources failed")

    async def once(self) -> None:
        """Go through the store, where no other server does."""
        # Longer than a turn, so that the role stays where it is; short enough that a lost server is replaced soon.
        if not await self._store.lead(_ROLE, self._name, 2.5 * self._interval_seconds):
            return
        begun = time.perf_counter()
        reaped = await self._store.reap(self._stale_after_seconds, self._removed_after_seconds)
        self._metrics.reaped(reaped, time.perf_counter() - begun)
        if reaped.stale or reaped.removed:
            _log.info("%d sources became stale, %d were removed", reaped.stale, reaped.removed)
