"""Self-tuned concurrency, on simulated storages: time is counted, not waited for."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest

from modelexpress_core.fetch.concurrency import (
    ConcurrencyLimit,
    FixedConcurrency,
    SelfTunedConcurrency,
    concurrency_for,
)
from modelexpress_core.providers import StorageCapabilities
from modelexpress_core.settings import LoadSettings

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def simulate(
    limit: ConcurrencyLimit,
    clock: Clock,
    *,
    latency: float,
    cap: float,
    reads: int,
    size: int = 8 * MIB,
    on_read: Callable[[int], None] = lambda number: None,
) -> float:
    """Seconds that ``reads`` reads take: each waits ``latency``, then all share ``cap`` bytes per second."""
    begun, free, sent, done = clock.now, clock.now, 0, 0
    ends: list[float] = []
    while done < reads:
        while sent < reads and len(ends) < limit.reads:
            free = max(free, clock.now + latency) + size / cap
            heapq.heappush(ends, free)
            sent += 1
            on_read(sent)
        clock.now = heapq.heappop(ends)
        done += 1
        limit.arrived(size)
    return clock.now - begun


@pytest.mark.parametrize("latency", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("cap", [50e6, 200e6, 12.5e9])
def test_a_long_load_is_nearly_as_fast_as_with_the_best_fixed_number(latency: float, cap: float) -> None:
    """At least 0.95 of the goodput of the best fixed setting, from one read to the most."""
    reads = 4000

    def seconds(limit: ConcurrencyLimit, clock: Clock) -> float:
        return simulate(limit, clock, latency=latency, cap=cap, reads=reads)

    best = min(seconds(FixedConcurrency(fixed), Clock()) for fixed in (1, 2, 4, 8, 16, 32, 64))

    clock = Clock()
    assert best / seconds(SelfTunedConcurrency(16, 64, clock), clock) >= 0.95


@pytest.mark.parametrize("most", [16, 64])
def test_fewer_reads_are_kept_where_they_lose_nothing(most: int) -> None:
    """Whatever is more than the network needs only costs threads that wait for each other."""
    clock = Clock()
    limit = SelfTunedConcurrency(16, most, clock)

    simulate(limit, clock, latency=0.001, cap=200e6, reads=300)

    assert limit.reads <= 4


def test_no_more_reads_than_pay() -> None:
    """Where the network is full with a few reads, the limit stays near them."""
    clock = Clock()
    limit = SelfTunedConcurrency(2, 128, clock)

    simulate(limit, clock, latency=0.02, cap=200e6, reads=2000)

    assert limit.reads <= 16


def test_a_complaint_lowers_the_limit_once_per_moment() -> None:
    """Many reads that are refused together are one complaint; another moment's are another."""
    clock = Clock()
    limit = SelfTunedConcurrency(100, 100, clock)

    for _ in range(50):
        limit.throttled()
    first = limit.reads
    clock.now += 2
    limit.throttled()

    assert (first, limit.reads) == (70, 49)


def test_the_limit_recovers_after_complaints() -> None:
    """A storage that has room again is used again."""
    clock = Clock()
    limit = SelfTunedConcurrency(64, 64, clock)
    for _ in range(8):
        limit.throttled()
        clock.now += 2
    lowest = limit.reads

    simulate(limit, clock, latency=0.1, cap=12.5e9, reads=6000)

    assert lowest <= 8
    assert limit.reads >= 32


def test_the_limit_never_falls_below_one() -> None:
    """However often the storage complains, a load goes on."""
    clock = Clock()
    limit = SelfTunedConcurrency(2, 64, clock)
    for _ in range(20):
        limit.throttled()
        clock.now += 2

    assert limit.reads == 1


@pytest.mark.parametrize(
    ("answer_seconds", "cpus", "start"),
    [
        (None, 2, 32),
        (0.02, 2, 32),
        (0.002, 1, 4),
        (0.002, 2, 4),
        (0.002, 8, 16),
        (0.002, 100, 32),
    ],
)
def test_a_load_from_near_by_begins_with_fewer_reads(answer_seconds: float | None, cpus: int, start: int) -> None:
    """Where answers come at once, the CPUs are the limit, but never above the storage's suggestion."""
    capabilities = StorageCapabilities(concurrency=32, most_concurrency=128)

    limit = concurrency_for(capabilities, LoadSettings(), answer_seconds=answer_seconds, cpus=cpus)

    assert start == limit.reads


def test_a_wrong_guess_that_a_storage_is_near_costs_little() -> None:
    """Fewer reads at the start are doubled for as long as goodput rises."""
    capabilities = StorageCapabilities(concurrency=32, most_concurrency=128)
    seconds = {}
    for answer_seconds in (0.002, 0.02):
        clock = Clock()
        limit = concurrency_for(capabilities, LoadSettings(), answer_seconds=answer_seconds, cpus=2, clock=clock)
        seconds[answer_seconds] = simulate(limit, clock, latency=0.02, cap=10e9, reads=5000)

    assert seconds[0.002] < 1.1 * seconds[0.02]


@pytest.mark.parametrize(("bound", "start", "most"), [(None, 8, 32), (3, 3, 3), (20, 8, 20), (1000, 8, 32)])
def test_the_users_concurrency_is_an_upper_bound(bound: int | None, start: int, most: int) -> None:
    """The user's figure lowers the storage's bounds, and raises neither."""
    capabilities = StorageCapabilities(concurrency=8, most_concurrency=32)
    clock = Clock()
    limit = concurrency_for(capabilities, LoadSettings(concurrency=bound), clock=clock)
    assert isinstance(limit, SelfTunedConcurrency)

    begun = limit.reads
    simulate(limit, clock, latency=0.2, cap=100e9, reads=3000)

    assert begun == start
    assert limit.reads == most
