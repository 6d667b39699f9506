"""Prometheus metrics of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from modelexpress_core.contracts.metadata_store import Reaped, SourceStatus
from modelexpress_core.wire.rpc import split_path

if TYPE_CHECKING:
    from modelexpress_core.server.cache.cache import CacheStats

__all__ = ["CacheMetrics", "ServerMetrics", "SourceServiceMetrics"]

_RPC_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class ServerMetrics:
    """Metrics in a registry of their own, which ``/metrics`` shows.

    Attributes:
        registry: The registry. Services of plugins add their metrics to it.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._rpcs = Counter(
            "mx_server_rpcs", "Calls that were answered.", ["service", "method", "code"], registry=self.registry
        )
        self._rpc_seconds = Histogram(
            "mx_server_rpc_seconds",
            "Duration of calls.",
            ["service", "method"],
            buckets=_RPC_BUCKETS,
            registry=self.registry,
        )
        self._store_seconds = Histogram(
            "mx_server_store_seconds",
            "Duration of calls of the metadata store.",
            ["operation"],
            buckets=_RPC_BUCKETS,
            registry=self.registry,
        )
        self._store_errors = Counter(
            "mx_server_store_errors",
            "Calls that the metadata store did not answer.",
            ["operation"],
            registry=self.registry,
        )
        self._sources = Gauge("mx_server_sources", "Sources by state.", ["status"], registry=self.registry)
        self._reaped = Counter(
            "mx_server_reaped", "Sources that became stale or were removed.", ["action"], registry=self.registry
        )
        self._reaper_seconds = Histogram(
            "mx_server_reaper_seconds",
            "Duration of a run of the reaper.",
            buckets=_RPC_BUCKETS,
            registry=self.registry,
        )
        build = Gauge("mx_build_info", "1, with the version as a label.", ["version"], registry=self.registry)
        build.labels(version("modelexpress-core")).set(1)
        # To find a metric by its labels takes longer than to count.
        self._of_answers: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._of_operations: dict[str, Histogram] = {}

    def answered(self, path: str, code: str, seconds: float) -> None:
        """A call was answered."""
        found = self._of_answers.get((path, code))
        if found is None:
            service, method = split_path(path)
            found = self._rpcs.labels(service, method, code), self._rpc_seconds.labels(service, method)
            self._of_answers[path, code] = found
        rpcs, rpc_seconds = found
        rpcs.inc()
        rpc_seconds.observe(seconds)

    def stored(self, operation: str, seconds: float) -> None:
        """The store answered."""
        found = self._of_operations.get(operation)
        if found is None:
            found = self._of_operations[operation] = self._store_seconds.labels(operation)
        found.observe(seconds)

    def store_failed(self, operation: str) -> None:
        """The store did not answer."""
        self._store_errors.labels(operation).inc()

    def reaped(self, reaped: Reaped, seconds: float) -> None:
        """The reaper ran."""
        self._reaped.labels("stale").inc(reaped.stale)
        self._reaped.labels("removed").inc(reaped.removed)
        self._reaper_seconds.observe(seconds)

    def counted(self, counts: Mapping[int, int]) -> None:
        """The present number of sources in each state."""
        for status in SourceStatus:
            self._sources.labels(status.name.lower()).set(counts.get(status, 0))


class SourceServiceMetrics:
    """Metrics of the service that keeps sources.

    Args:
        registry: The registry of the server.

    Attributes:
        truncated: Lists from which sources were left out.
        unreadable: Records that could not be read.
        refused: Publications that exceed a limit.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.truncated = Counter(
            "mx_server_lists_truncated", "Lists from which sources were left out for their size.", registry=registry
        )
        self.unreadable = Counter(
            "mx_server_unreadable_records", "Times a record could not be read, and was left out.", registry=registry
        )
        self.refused = Counter(
            "mx_server_records_refused", "Publications that were refused because of a limit.", registry=registry
        )


class CacheMetrics(Collector):
    """Metrics of the model cache. What the cache counts itself is read when the metrics are.

    Args:
        registry: The registry of the server.
        stats: What the cache holds and did.
    """

    def __init__(self, registry: CollectorRegistry, stats: Callable[[], CacheStats]) -> None:
        self._stats = stats
        sent = Counter(
            "mx_cache_sent_bytes", "Bytes of files that were sent to readers.", ["channel"], registry=registry
        )
        self._damaged = Counter(
            "mx_cache_damaged_chunks",
            "Chunks of cached files that differ from the chunk manifest.",
            registry=registry,
        )
        self._sent_over = {channel: sent.labels(channel) for channel in ("bulk", "grpc")}
        registry.register(self)

    def sent(self, channel: str, nbytes: int) -> None:
        """Bytes were sent to a reader: over the channel ``"bulk"`` or ``"grpc"``."""
        self._sent_over[channel].inc(nbytes)

    def damaged(self, chunks: int) -> None:
        """Chunks of cached files were found to be damaged."""
        self._damaged.inc(chunks)

    def describe(self) -> Iterator[Metric]:
        """The metrics that ``collect`` has, without asking the cache."""
        return self._families(None)

    def collect(self) -> Iterator[Metric]:
        """The metrics that the cache itself counts."""
        return self._families(self._stats())

    @staticmethod
    def _families(stats: CacheStats | None) -> Iterator[Metric]:
        for name, text, field in _CACHE_COUNTERS:
            yield CounterMetricFamily(name, text, value=getattr(stats, field, 0))
        for name, text, field in _CACHE_GAUGES:
            yield GaugeMetricFamily(name, text, value=getattr(stats, field, 0) or 0)


#: Name, help and field of the cache's statistics.
_CACHE_COUNTERS = (
    ("mx_cache_hits", "Requests for versions of models that were in the cache.", "hits"),
    ("mx_cache_misses", "Requests that began a download, or joined one.", "misses"),
    ("mx_cache_origin_bytes", "Bytes that were downloaded from storages.", "origin_bytes"),
    ("mx_cache_replica_bytes", "Bytes that were downloaded from other replicas of the server.", "replica_bytes"),
    ("mx_cache_evictions", "Versions of models that were removed to keep the limits.", "evictions"),
    ("mx_cache_download_failures", "Downloads that failed.", "failures"),
)
_CACHE_GAUGES = (
    ("mx_cache_downloads", "Downloads under way.", "downloads"),
    ("mx_cache_bytes", "Bytes of all models in the cache.", "size_bytes"),
    ("mx_cache_limit_bytes", "Limit of these bytes; 0: what the disk holds.", "limit_bytes"),
    ("mx_cache_models", "Versions of models that are complete.", "models"),
)
