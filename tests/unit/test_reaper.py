"""Of several servers that share a store, the leader alone reaps."""

from __future__ import annotations

import asyncio

import pytest

from modelexpress_core.contracts.metadata_store import SourceRecord, SourceStatus, StoredSource
from modelexpress_core.server.metrics import ServerMetrics
from modelexpress_core.server.reaper import Reaper
from modelexpress_core.server.stores.memory import MemoryStore


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def reaper(store: MemoryStore, metrics: ServerMetrics) -> Reaper:
    return Reaper(store, metrics, stale_after_seconds=5.0, removed_after_seconds=60.0, interval_seconds=10.0)


def runs(metrics: ServerMetrics) -> float | None:
    return metrics.registry.get_sample_value("mx_server_reaper_seconds_count")


def test_the_leader_alone_reaps(caplog: pytest.LogCaptureFixture) -> None:
    """It goes on while it runs at its interval; another takes over once it stops, with a larger token."""
    caplog.set_level("DEBUG", "modelexpress_core.server.reaper")
    clock = Clock()
    store = MemoryStore(clock)
    one, other = ServerMetrics(), ServerMetrics()
    first, second = reaper(store, one), reaper(store, other)

    async def scenario() -> None:
        await store.publish(StoredSource(SourceRecord("s", "w", "m", status=SourceStatus.READY), b"", b""))
        for _ in range(3):
            clock.now += 10
            await first.once()
            await second.once()
        clock.now += 26
        await second.once()
        await first.once()

    asyncio.run(scenario())

    assert (3.0, 1.0) == (runs(one), runs(other))
    assert 1.0 == one.registry.get_sample_value("mx_server_reaped_total", {"action": "stale"})
    words = [record.getMessage() for record in caplog.records if "this server" in record.getMessage()]
    tokens = [int(text.rpartition(" ")[2]) for text in words if "token" in text]
    assert sorted(set(tokens)) == tokens
    assert (2, "this server reaps no more") == (len(tokens), words[-1])
