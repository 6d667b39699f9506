"""What Prometheus sees of looking for peers, where prometheus-client is installed (it is wherever vLLM is).

The names are those that dashboards for existing clients know.
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

#: None at all is worth a bucket of its own: it tells "nobody published" from "all were left out".
_COUNT_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

_SECONDS_BUCKETS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@cache
def source_metrics() -> SourceMetrics:
    """Those of this process, in the default registry; they count nothing where prometheus-client is not installed."""
    if importlib.util.find_spec("modelexpress") is not None:
        return SourceMetrics(
            None
        )  # the existing client counts under these names, and counts nothing where it is second
    try:
        import prometheus_client
    except ImportError:
        return SourceMetrics(None)
    try:
        return SourceMetrics(prometheus_client.REGISTRY)
    except ValueError as exc:  # the existing client is in this process, too, and was first
        _log.debug("looking for peers is not counted: %s", exc)
        return SourceMetrics(None)


class SourceMetrics:
    """Counts what discoveries and ranking do, by the selector that is set.

    Args:
        registry: Where they are registered; None to count nothing.
    """

    def __init__(self, registry: CollectorRegistry | None) -> None:
        self._counts = registry is not None
        if registry is None:
            return
        from prometheus_client import Counter, Histogram

        self._listed = Counter(
            "mx_p2p_list_sources", "Questions to servers for peers.", ["policy", "result"], registry=registry
        )
        self._candidates = Histogram(
            "mx_p2p_candidates",
            "Peers that were left after each step.",
            ["policy", "stage"],
            buckets=_COUNT_BUCKETS,
            registry=registry,
        )
        self._selections = Counter(
            "mx_p2p_source_selections", "Loads for which a peer came first.", ["policy"], registry=registry
        )
        self._seconds = Histogram(
            "mx_p2p_source_selection_seconds",
            "How long it took to put candidates in order.",
            ["policy"],
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )

    def listed(self, policy: str, result: str) -> None:
        """A server was asked: ``"ok"``, ``"empty"`` or ``"error"``."""
        if self._counts:
            self._listed.labels(policy, result).inc()

    def counted(self, policy: str, stage: str, count: int) -> None:
        """So many peers were ``"listed"``, had the right rank (``"rank_matched"``), or are ``"usable"``."""
        if self._counts:
            self._candidates.labels(policy, stage).observe(count)

    def selected(self, policy: str) -> None:
        """A peer came first."""
        if self._counts:
            self._selections.labels(policy).inc()

    @contextmanager
    def selecting(self, policy: str) -> Iterator[None]:
        """Candidates are put in order meanwhile."""
        begun = time.perf_counter()
        yield
        if self._counts:
            self._seconds.labels(policy).observe(time.perf_counter() - begun)
