"""Prometheus metrics of the search for peers, if prometheus-client is installed (vLLM installs it).

The names are those of existing clients, so that their dashboards work.
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

#: Zero has its own bucket: it shows that no peer was published.
_COUNT_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

_SECONDS_BUCKETS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@cache
def source_metrics() -> SourceMetrics:
    """The metrics of this process, in the default registry. They count nothing without prometheus-client."""
    if importlib.util.find_spec("modelexpress") is not None:
        return SourceMetrics(None)  # the existing client uses these names, and counts nothing if they are taken
    try:
        import prometheus_client
    except ImportError:
        return SourceMetrics(None)
    try:
        return SourceMetrics(prometheus_client.REGISTRY)
    except ValueError as exc:  # the existing client has registered them in this process
        _log.debug("the search for peers is not counted: %s", exc)
        return SourceMetrics(None)


class SourceMetrics:
    """Counts the work of discoveries and ranking, by selector.

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
            "mx_p2p_source_selections", "Loads that ranked a peer first.", ["policy"], registry=registry
        )
        self._seconds = Histogram(
            "mx_p2p_source_selection_seconds",
            "Time to rank the candidates.",
            ["policy"],
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )

    def listed(self, policy: str, result: str) -> None:
        """Count a request to a server: ``"ok"``, ``"empty"`` or ``"error"``."""
        if self._counts:
            self._listed.labels(policy, result).inc()

    def counted(self, policy: str, stage: str, count: int) -> None:
        """Count peers that were ``"listed"``, had the right rank (``"rank_matched"``), or are ``"usable"``."""
        if self._counts:
            self._candidates.labels(policy, stage).observe(count)

    def selected(self, policy: str) -> None:
        """Count a load that ranked a peer first."""
        if self._counts:
            self._selections.labels(policy).inc()

    @contextmanager
    def selecting(self, policy: str) -> Iterator[None]:
        """Measure the time of a block that ranks candidates."""
        begun = time.perf_counter()
        yield
        if self._counts:
            self._seconds.labels(policy).observe(time.perf_counter() - begun)
