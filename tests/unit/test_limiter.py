"""What limits a load, judged by the time that it spends."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import save

import modelexpress_core as mx
from modelexpress_core.events import LoadProgress
from modelexpress_core.fetch.limiter import Usage, UsageMeter
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from modelexpress_core.storage.memory import MemoryStorage, store
from modelexpress_core.testing import FaultPolicy, FaultyStorage


@pytest.mark.parametrize(
    ("expected", "used"),
    [
        ("network", Usage(wall_seconds=1, cpu_seconds=0.5, reading_seconds=8, requests=10)),
        ("cpu", Usage(wall_seconds=1, cpu_seconds=1.9, reading_seconds=8, requests=10)),
        ("destination", Usage(wall_seconds=1, cpu_seconds=1.9, reading_seconds=2, delivering_seconds=6, requests=10)),
        ("planning", Usage(wall_seconds=1, cpu_seconds=0.9, reading_seconds=0.2, requests=10)),
        ("source", Usage(wall_seconds=1, cpu_seconds=0.1, reading_seconds=8, requests=10, throttled=1)),
        ("source", Usage(wall_seconds=1, cpu_seconds=0.1, reading_seconds=8, requests=10, failures=4)),
        ("network", Usage(wall_seconds=1, cpu_seconds=0.1, reading_seconds=8, requests=10, failures=1)),
        ("", Usage(wall_seconds=1)),
    ],
)
def test_the_limit_is_where_time_is_spent(expected: str, used: Usage) -> None:
    """On a machine with two processors."""
    assert expected == used.limiter(Usage(), processors=2)


def test_what_counts_is_what_was_used_since_the_last_time() -> None:
    """A complaint of an hour ago says nothing of now; where nothing has happened since, the last answer holds."""
    meter = UsageMeter()
    meter.add(reading_seconds=50.0, requests=4, throttled=1)
    first = meter.limiter()
    meter.add(reading_seconds=50.0, requests=4)

    assert ["source", "network", "network"] == [first, meter.limiter(), meter.limiter()]


def limits_of(storage: object, **environ: str) -> set[str]:
    """What limited a load from ``storage`` according to its progress events."""
    seen: list[str] = []

    class Plugin:
        @mx.hookimpl
        def mx_register_storages(self) -> list[StorageProvider]:
            capabilities = StorageCapabilities(concurrency=4, most_concurrency=4)
            return [StorageProvider("slow", ("slow",), lambda uri, env: storage, capabilities=capabilities)]

        @mx.hookimpl
        def mx_load_progress(self, event: LoadProgress) -> None:
            seen.append(event.limiter)

    plugins = mx.PluginManager.discover({})
    plugins.register(Plugin(), name="slow")
    mx.load_state_dict("slow://host/model", plugins=plugins, environ={"MX_CHUNK_BYTES": "65536", **environ})
    return set(seen)


@pytest.fixture
def memory() -> MemoryStorage:
    storage = MemoryStorage()
    storage.put("model/model.safetensors", save({"weight": torch.zeros(1 << 20)}))
    return storage


def test_a_load_that_waits_for_bytes_says_network(memory: MemoryStorage) -> None:
    """Told by the events that observers get."""
    assert "network" in limits_of(FaultyStorage(memory, FaultPolicy(latency_seconds=0.05)))


@pytest.mark.slow
def test_a_load_from_a_storage_that_fails_says_source(memory: MemoryStorage) -> None:
    """As long as failures are most of what comes."""
    faulty = FaultyStorage(memory, FaultPolicy(latency_seconds=0.02, unavailable=0.6, seed=3))

    assert "source" in limits_of(faulty, MX_RETRY_ATTEMPTS="50")


def test_code_that_asks_slowly_is_the_limit_itself() -> None:
    """Nothing is read while it thinks."""
    seen: list[str] = []

    class Watch:
        @mx.hookimpl
        def mx_load_progress(self, event: LoadProgress) -> None:
            seen.append(event.limiter)

    store("limiter").put("m/model.safetensors", save({f"w{i}": torch.zeros(1 << 16) for i in range(8)}))
    plugins = mx.PluginManager.discover({})
    plugins.register(Watch(), name="watch")
    target = torch.zeros(1 << 16)

    with mx.deferred_weights("memory://limiter/m", plugins=plugins, environ={}) as weights:
        for _, tensor in weights:
            target.copy_(tensor)
            target.sum()  # waits for the bytes
            time.sleep(0.1)

    assert "planning" in seen
