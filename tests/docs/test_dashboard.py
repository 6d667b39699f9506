"""The Grafana dashboard asks for metrics that exist, by labels that they have."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from prometheus_client import CollectorRegistry

from devtools import dashboard
from modelexpress_core.server.metrics import CacheMetrics, ServerMetrics, SourceServiceMetrics
from modelexpress_core.sources.metrics import SourceMetrics, WorkerMetrics

#: What PromQL and Grafana define themselves.
_WORDS = {"by", "histogram_quantile", "le", "rate", "sum"}


def _known() -> dict[str, set[str]]:
    """The labels of each series that can be scraped."""
    registry = ServerMetrics().registry
    for cls in (SourceServiceMetrics, SourceMetrics, WorkerMetrics):
        cls(registry)
    CacheMetrics(registry, _no_stats)
    return _series(registry)


def _no_stats() -> NoReturn:
    raise NotImplementedError  # the names of metrics are read, and never their values


def _series(registry: CollectorRegistry) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    collectors: set[Any] = set(registry._collector_to_names)
    for collector in collectors:
        labels = set(getattr(collector, "_labelnames", ()))
        for metric in collector.describe():
            if metric.type == "histogram":
                found[f"{metric.name}_bucket"] = {*labels, "le"}
            else:
                found[f"{metric.name}_total" if metric.type == "counter" else metric.name] = labels
    return found


def test_the_committed_dashboard_is_the_generated_one() -> None:
    """``python -m devtools.dashboard`` writes it."""
    assert dashboard.PAGE.read_text() == dashboard.dashboard() + "\n"


def test_queries_ask_for_metrics_and_labels_that_exist() -> None:
    """A panel of a metric that was renamed would stay empty, and nobody would notice."""
    known = _known()
    panels = [panel for _, panels in dashboard.ROWS for panel in panels]
    for expression, legend in (query for panel in panels for query in panel.queries):
        text = re.sub(r'"[^"]*"|\$__rate_interval|\b\d+(\.\d+)?\b', "", expression)
        names = set(re.findall(r"\bmx_\w+", text))
        labels = set(re.findall(r"\w+", text)) - names - _WORDS
        shown = set(re.findall(r"{{(\w+)}}", legend))

        assert names
        assert names <= known.keys(), expression
        for name in names:
            assert labels | shown <= known[name], expression
        assert shown <= labels, f"a legend names a label by which {expression} does not sum"


def test_panels_do_not_overlap() -> None:
    """Each has its own cells of the grid, and its own number."""
    panels = json.loads(dashboard.dashboard())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len(set(cells)) == len(cells)
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(0 <= x < 24 for x, _ in cells)
