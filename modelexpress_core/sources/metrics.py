"""Prometheus metrics of readers and of workers that are read, if prometheus-client is installed (vLLM brings it).

Those of peer discovery have the names that dashboards for existing clients use.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["SourceMetrics", "WorkerMetrics", "report_quarantine", "source_metrics", "worker_metrics"]

_log = logging.getLogger(__name__)

#: Zero has its own bucket: it distinguishes "no worker published" from "all were filtered out".
_COUNT_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

_SECONDS_BUCKETS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

_PHASE_BUCKETS = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)

_TRANSFER_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)

#: Workers that get a label of their own. The others are one label, so that no fleet fills a Prometheus.
_MAX_PEERS = 64
_OTHER_PEERS = "other"


@cache
def source_metrics() -> SourceMetrics:
    """Return the metrics of this process, in the default registry. Without prometheus-client they count nothing."""
    if importlib.util.find_spec("modelexpress") is not None:
        # The existing client uses these names, and does not count if they are registered already.
        return SourceMetrics(None)
    try:
        import prometheus_client
    except ImportError:
        return SourceMetrics(None)
    try:
        return SourceMetrics(prometheus_client.REGISTRY)
    except ValueError as exc:  # the existing client is in this process too, and registered first
        _log.debug("peer discovery is not counted: %s", exc)
        return SourceMetrics(None)


class SourceMetrics:
    """Counts what discoveries, ranking and loads from peers do.

    Args:
        registry: Registry for the metrics; None to count nothing.
    """

    def __init__(self, registry: CollectorRegistry | None) -> None:
        self._counts = registry is not None
        if registry is None:
            return
        from prometheus_client import Counter, Histogram

        self._listed = Counter(
            "mx_p2p_list_sources", "Requests to servers for peers.", ["policy", "result"], registry=registry
        )
        self._candidates = Histogram(
            "mx_p2p_candidates",
            "Peers that remained after each step.",
            ["policy", "stage"],
            buckets=_COUNT_BUCKETS,
            registry=registry,
        )
        self._selections = Counter(
            "mx_p2p_source_selections", "Loads for which a peer ranked first.", ["policy"], registry=registry
        )
        self._seconds = Histogram(
            "mx_p2p_source_selection_seconds",
            "How long ranking the candidates took.",
            ["policy"],
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )

        self._attempts = Counter(
            "mx_p2p_source_attempts", "Loads from a peer.", ["policy", "result"], registry=registry
        )
        self._transfers = Histogram(
            "mx_p2p_transfer_seconds",
            "How long loads from a peer took.",
            ["outcome"],
            buckets=_TRANSFER_BUCKETS,
            registry=registry,
        )
        self._read = Counter("mx_p2p_read_bytes", "Bytes read from peers.", ["transport"], registry=registry)
        self._mismatches = Counter(
            "mx_p2p_digest_mismatches",
            "Chunks from peers with a wrong digest.",
            ["transport", "peer"],
            registry=registry,
        )
        self._phases = Histogram(
            "mx_p2p_phase_seconds",
            "How long the phases of loads from peers took.",
            ["phase"],
            buckets=_PHASE_BUCKETS,
            registry=registry,
        )
        self._peers: set[str] = set()
        self._peers_lock = threading.Lock()

    def loaded(self, policy: str, *, error: str, seconds: float, phases: Mapping[str, float]) -> None:
        """Count a load from peers.

        Args:
            policy: How the peers were chosen.
            error: Class of the error that ended it, or empty.
            seconds: How long it took.
            phases: How long ``"open"``, ``"read"``, ``"verify"`` and ``"release"`` took, those that were reached.
                Digests are verified while other chunks are read.
        """
        if self._counts:
            self._attempts.labels(policy, error or "ok").inc()
            self._transfers.labels("error" if error else "ok").observe(seconds)
            for phase, taken in phases.items():
                self._phases.labels(phase).observe(taken)

    def read(self, transport: str, peer: str, *, read_bytes: int, mismatches: int) -> None:
        """Count what one peer delivered to a load, and its chunks with a wrong digest.

        Args:
            transport: Scheme of the transport.
            peer: The ``host:port`` of the worker.
            read_bytes: Bytes that arrived.
            mismatches: Chunks that arrived with a wrong digest.
        """
        if not self._counts:
            return
        self._read.labels(transport).inc(read_bytes)
        if mismatches:
            with self._peers_lock:
                if peer not in self._peers and len(self._peers) >= _MAX_PEERS:
                    peer = _OTHER_PEERS
                self._peers.add(peer)
            self._mismatches.labels(transport, peer).inc(mismatches)

    def listed(self, policy: str, result: str) -> None:
        """Count a request to a server, which ended with ``"ok"``, ``"empty"`` or ``"error"``."""
        if self._counts:
            self._listed.labels(policy, result).inc()

    def counted(self, policy: str, stage: str, count: int) -> None:
        """Record how many peers were ``"listed"``, had the right rank (``"rank_matched"``), or are ``"usable"``."""
        if self._counts:
            self._candidates.labels(policy, stage).observe(count)

    def selected(self, policy: str) -> None:
        """Count a load for which a peer ranked first."""
        if self._counts:
            self._selections.labels(policy).inc()

    @contextmanager
    def selecting(self, policy: str) -> Iterator[None]:
        """Measure the ranking of candidates in the ``with`` block."""
        begun = time.perf_counter()
        yield
        if self._counts:
            self._seconds.labels(policy).observe(time.perf_counter() - begun)


# -- the worker's side -------------------------------------------------------------------------------------------------


class _Leases(Protocol):
    def out(self) -> int: ...


@cache
def worker_metrics() -> WorkerMetrics:
    """Return the metrics of the workers of this process. Without prometheus-client they count nothing."""
    try:
        import prometheus_client
    except ImportError:
        return WorkerMetrics(None)
    return WorkerMetrics(prometheus_client.REGISTRY)


def report_quarantine(transport: str, nbytes: Callable[[], int]) -> None:
    """Have a transport's bytes in quarantine counted: memory that is kept, since reads may still write to it.

    Args:
        transport: Scheme of the transport.
        nbytes: Returns how many bytes are kept now.
    """
    worker_metrics().quarantine(transport, nbytes)


class WorkerMetrics:
    """Counts what readers get from the workers of this process.

    Args:
        registry: Registry for the metrics; None to count nothing.
    """

    def __init__(self, registry: CollectorRegistry | None) -> None:
        self._counts = registry is not None
        self._watched: weakref.WeakSet[_Leases] = weakref.WeakSet()
        self._watched_lock = threading.Lock()
        if registry is None:
            return
        from prometheus_client import Counter, Gauge

        self._served = Counter(
            "mx_p2p_served_bytes", "Bytes that readers got from workers.", ["transport"], registry=registry
        )
        self._leases = Gauge("mx_p2p_leases", "Leases that readers hold.", registry=registry)
        self._leases.set_function(self._active_leases)
        self._refused = Counter(
            "mx_p2p_leases_refused", "Leases that workers did not grant.", ["reason"], registry=registry
        )
        self._grants = Counter(
            "mx_p2p_grants_refused", "Read grants that workers did not accept.", ["reason"], registry=registry
        )
        self._quarantined = Gauge(
            "mx_p2p_quarantined_bytes",
            "Memory that is kept, because reads that failed may still write to it.",
            ["transport"],
            registry=registry,
        )

    def served(self, transport: str, nbytes: int) -> None:
        """Count bytes that a worker sent, or that a reader says it has read."""
        if self._counts:
            self._served.labels(transport).inc(nbytes)

    def watch_leases(self, leases: _Leases) -> None:
        """Count the active leases of one worker, for as long as it exists."""
        with self._watched_lock:
            self._watched.add(leases)

    def lease_refused(self, reason: str) -> None:
        """Count a lease that was not granted: ``"draining"``, ``"reader_limit"`` or ``"worker_limit"``."""
        if self._counts:
            self._refused.labels(reason).inc()

    def grant_refused(self, reason: str) -> None:
        """Count a grant: ``"unauthenticated"`` (expired, forged), ``"permission_denied"`` (of another worker)."""
        if self._counts:
            self._grants.labels(reason).inc()

    def quarantine(self, transport: str, nbytes: Callable[[], int]) -> None:
        """Count the bytes that a transport keeps."""
        if self._counts:
            self._quarantined.labels(transport).set_function(nbytes)

    def _active_leases(self) -> float:
        with self._watched_lock:
            watched = list(self._watched)
        return float(sum(leases.out() for leases in watched))
