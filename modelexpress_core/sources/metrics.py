"""Prometheus metrics of peer discovery, if prometheus-client is installed (vLLM always brings it).

The metrics have the names that dashboards for existing clients use.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["SourceMetrics", "source_metrics"]

_log = logging.getLogger(__name__)

#: Zero has its own bucket: it distinguishes "no worker published" from "all were filtered out".
_COUNT_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

_SECONDS_BUCKETS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

_TRANSFER_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


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
            "mx_p2p_digest_mismatches", "Chunks from peers with a wrong digest.", ["transport"], registry=registry
        )

    def loaded(self, policy: str, *, error: str, seconds: float) -> None:
        """Count a load from peers; ``error`` is the class of the error that ended it, or empty."""
        if self._counts:
            self._attempts.labels(policy, error or "ok").inc()
            self._transfers.labels("error" if error else "ok").observe(seconds)

    def read(self, transport: str, *, read_bytes: int, mismatches: int) -> None:
        """Count what one peer delivered to a load."""
        if self._counts:
            self._read.labels(transport).inc(read_bytes)
            self._mismatches.labels(transport).inc(mismatches)

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
