"""Prometheus metrics of loads, if prometheus-client is installed (vLLM always brings it).

They appear at vLLM's ``/metrics`` if the load ran in the process of the HTTP server, or if
``PROMETHEUS_MULTIPROC_DIR`` lets prometheus-client collect the metrics of all processes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from modelexpress_core.events import LoadFailed
from modelexpress_core.report import LoadReport

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["LoadMetrics", "load_metrics"]

_LABELS = ("engine", "model", "scheme")

_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1200, 3600)


@cache
def load_metrics() -> LoadMetrics | None:
    """Return the metrics of this process; None if prometheus-client is not installed."""
    try:
        import prometheus_client
    except ImportError:
        return None
    return LoadMetrics(prometheus_client.REGISTRY)


class LoadMetrics:
    """Counts loads by model and by the scheme of their source.

    Args:
        registry: Registry for the metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Histogram

        self._seconds = Histogram(
            "mx_load_seconds",
            "Duration of loads by ModelExpress.",
            [*_LABELS, "outcome"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._phase_seconds = Histogram(
            "mx_load_phase_seconds",
            "Duration of the phases of successful loads.",
            [*_LABELS, "phase"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._bytes = Counter(
            "mx_load_bytes",
            "Bytes that loads needed, fetched, and materialised as plain tensors for code that computes with them.",
            [*_LABELS, "kind"],
            registry=registry,
        )

    def loaded(self, model: str, report: LoadReport) -> None:
        """Count a successful load for ``model``."""
        labels = ("vllm", model, _scheme(report.uri))
        self._seconds.labels(*labels, "success").observe(report.seconds)
        for phase, seconds in report.phase_seconds.items():
            self._phase_seconds.labels(*labels, phase).observe(seconds)
        counts = {
            "needed": report.bytes_needed,
            "fetched": report.bytes_fetched,
            "materialised": report.bytes_materialised,
        }
        for kind, count in counts.items():
            self._bytes.labels(*labels, kind).inc(count)

    def failed(self, model: str, event: LoadFailed) -> None:
        """Count a failed load for ``model``."""
        self._seconds.labels("vllm", model, _scheme(event.uri), "error").observe(event.seconds)


def _scheme(uri: str) -> str:
    return uri.partition("://")[0]
