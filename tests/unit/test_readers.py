"""What a worker knows of its readers, and what it counts."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from modelexpress_core.sources.metrics import SourceMetrics, WorkerMetrics, report_quarantine
from modelexpress_core.sources.readers import Reader, Readers
from modelexpress_core.sources.worker_service import RENEWAL_SECONDS, Leases, TooManyLeasesError


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def change(figure: Callable[[], float], act: Callable[[], object]) -> float:
    before = figure()
    act()
    return figure() - before


def test_a_reader_is_listed_while_it_reads_and_for_a_while_after() -> None:
    """With its bytes and times; the latest comes first, and those that have ended follow."""
    clock = Clock()
    leases = Leases(600, clock)
    first, second = leases.grant("a"), leases.grant("b")
    assert first
    assert second
    leases.readers.count_sent("grpc", first, 100)
    clock.seconds = 2
    leases.readers.count_sent("grpc", first, 50)
    leases.release(first)
    clock.seconds = 5

    assert [Reader("b", "", 0, False, 5, None), Reader("a", "grpc", 150, True, 2, 3)] == leases.readers.listed()
    clock.seconds = 700
    leases.out()
    assert [Reader("b", "", 0, False, 700, 0)] == leases.readers.listed()


def test_leases_that_expire_or_are_drained_end_their_readers() -> None:
    """As those that are released do."""
    clock = Clock()
    leases = Leases(600, clock)
    leases.grant("expires", renews=True)
    clock.seconds = RENEWAL_SECONDS + 1
    leases.grant("drained")

    leases.drain(0)

    assert [("drained", 0), ("expires", 0)] == [(each.name, each.ended_seconds) for each in leases.readers.listed()]


def test_what_a_reader_tells_is_bounded() -> None:
    """It counts as long as the worker has counted nothing; no reader reads a byte more than twice."""
    readers = Readers(Clock())
    readers.offered_bytes = 1000
    readers.begin("lease", "a")
    readers.connected("lease", "told")

    def told(*figures: int) -> Callable[[], object]:
        return lambda: [readers.told("lease", figure) for figure in figures]

    def served() -> float:
        return counted("mx_p2p_served_bytes_total", transport="told")

    assert 700 == change(served, told(300, 700, 100))
    assert 1300 == change(served, told(1 << 62))
    assert [(2000, False)] == [(each.read_bytes, each.counted) for each in readers.listed()]
    readers.begin("counted", "b")
    readers.count_sent("told", "counted", 5)
    assert 0 == change(served, lambda: readers.told("counted", 400))
    assert 0 == change(served, lambda: readers.told("no such lease", 400))


def test_readers_that_have_ended_fill_no_memory() -> None:
    """The oldest are forgotten."""
    leases = Leases(600, Clock())
    for number in range(1000):
        lease = leases.grant(f"reader {number}")
        assert lease
        leases.release(lease)

    listed = leases.readers.listed()

    assert (64, "reader 999") == (len(listed), listed[0].name)


def test_leases_are_counted() -> None:
    """Those that are held, of all workers of the process, and those that were refused."""

    def active() -> float:
        return counted("mx_p2p_leases")

    def refused(reason: str) -> Callable[[], float]:
        return lambda: counted("mx_p2p_leases_refused_total", reason=reason)

    one, other = Leases(600), Leases(600)

    def grant(leases: Leases, reader: str) -> None:
        with pytest.raises(TooManyLeasesError):
            leases.grant(reader)

    assert 2 == change(active, lambda: (one.grant("a"), other.grant("a")))
    assert -1 == change(active, lambda: other.drain(0))
    for _ in range(127):
        one.grant("a")
    assert 1 == change(refused("reader_limit"), lambda: grant(one, "a"))
    for reader in range(7):
        for _ in range(128):
            one.grant(f"b{reader}")
    assert 1 == change(refused("worker_limit"), lambda: grant(one, "c"))
    assert 1 == change(refused("draining"), lambda: other.grant("a"))
    one.drain(0)


def test_a_transport_reports_what_it_keeps() -> None:
    """The gauge asks it at each scrape."""
    kept = [3]
    report_quarantine("odd", lambda: kept[0])

    def gauge() -> float:
        return counted("mx_p2p_quarantined_bytes", transport="odd")

    assert 4 == change(gauge, lambda: operator.setitem(kept, 0, 7))


def test_labels_of_peers_are_bounded() -> None:
    """The first 64 workers with wrong digests have their own; none without a wrong digest has one."""
    registry = CollectorRegistry()
    metrics = SourceMetrics(registry)
    for number in range(70):
        metrics.read("grpc", f"host-{number}:1", read_bytes=1, mismatches=1)
    metrics.read("grpc", "host-3:1", read_bytes=1, mismatches=4)
    metrics.read("grpc", "host-99:1", read_bytes=1, mismatches=0)

    def wrong(peer: str) -> float | None:
        labels = {"transport": "grpc", "peer": peer}
        return registry.get_sample_value("mx_p2p_digest_mismatches_total", labels)

    assert (5, 1, 6, None, None) == tuple(map(wrong, ("host-3:1", "host-63:1", "other", "host-64:1", "host-99:1")))


def test_without_prometheus_nothing_is_counted() -> None:
    """And nothing fails."""
    metrics = WorkerMetrics(None)

    metrics.served("grpc", 1)
    metrics.lease_refused("draining")
    metrics.grant_refused("unauthenticated")
    metrics.quarantine("nixl", lambda: 0)
    metrics.watch_leases(Leases(600))
