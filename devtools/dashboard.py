"""Write the Grafana dashboard docs/grafana-dashboard.json: ``python -m devtools.dashboard``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

__all__ = ["PAGE", "ROWS", "Panel", "dashboard"]

PAGE = Path(__file__).parents[1] / "docs" / "grafana-dashboard.json"

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}

#: Grafana's grid has 24 columns.
_COLUMNS = 24
_WIDTH = 8
_HEIGHT = 8


@frozen
class Panel:
    """A graph over time.

    Attributes:
        title: What it shows, and what to think of it.
        queries: Queries in PromQL, and the legend of each.
        unit: Grafana's name of the unit.
        help: Shown at its title.
    """

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    help: str = ""


def _p(quantile: float, histogram: str, *labels: str) -> str:
    """A quantile of a histogram, for each value of ``labels``."""
    by = ", ".join(("le", *labels))
    return f"histogram_quantile({quantile}, sum by ({by}) (rate({histogram}_bucket[$__rate_interval])))"


def _rate(counter: str, *labels: str) -> str:
    """The rate of a counter, for each value of ``labels``."""
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} (rate({counter}[$__rate_interval]))"


ROWS: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "Server",
        (
            Panel("Calls", [(_rate("mx_server_rpcs_total", "service", "method"), "{{service}}/{{method}}")], "reqps"),
            Panel(
                "Calls that failed",
                [
                    (
                        'sum by (method, code) (rate(mx_server_rpcs_total{code!="OK"}[$__rate_interval]))',
                        "{{method}} {{code}}",
                    )
                ],
                "reqps",
                "CANCELLED is a client that hung up.",
            ),
            Panel("Duration of calls, p99", [(_p(0.99, "mx_server_rpc_seconds", "method"), "{{method}}")], "s"),
            Panel("Sources", [("sum by (status) (mx_server_sources)", "{{status}}")]),
            Panel(
                "Metadata store",
                [
                    (_p(0.99, "mx_server_store_seconds", "operation"), "{{operation}}, p99"),
                ],
                "s",
            ),
            Panel(
                "Trouble of the metadata store",
                [
                    (_rate("mx_server_store_errors_total", "operation"), "no answer: {{operation}}"),
                    (_rate("mx_server_unreadable_records_total"), "unreadable records"),
                    (_rate("mx_server_records_refused_total"), "refused publications"),
                    (_rate("mx_server_lists_truncated_total"), "lists cut short"),
                    (_rate("mx_server_reaped_total", "action"), "reaped: {{action}}"),
                ],
                "ops",
            ),
        ),
    ),
    (
        "Model cache",
        (
            Panel(
                "Requests",
                [(_rate("mx_cache_hits_total"), "in the cache"), (_rate("mx_cache_misses_total"), "downloaded")],
                "reqps",
            ),
            Panel(
                "Bytes",
                [
                    (_rate("mx_cache_origin_bytes_total"), "from storages"),
                    (_rate("mx_cache_replica_bytes_total"), "from other replicas"),
                    (_rate("mx_cache_sent_bytes_total", "channel"), "to readers, over {{channel}}"),
                ],
                "Bps",
            ),
            Panel("Downloads under way", [("sum(mx_cache_downloads)", "downloads")]),
            Panel(
                "Size",
                [("sum(mx_cache_bytes)", "models"), ("sum(mx_cache_limit_bytes)", "limit; 0: what the disk holds")],
                "bytes",
            ),
            Panel(
                "Versions",
                [("sum(mx_cache_models)", "complete"), (_rate("mx_cache_evictions_total"), "removed per second")],
            ),
            Panel(
                "Trouble",
                [
                    (_rate("mx_cache_download_failures_total"), "downloads that failed"),
                    (_rate("mx_cache_damaged_chunks_total"), "damaged chunks"),
                ],
                "ops",
                "Damaged chunks: the disk of the cache, or another program that writes to it.",
            ),
        ),
    ),
    (
        "Workers that read from others",
        (
            Panel("Bytes read", [(_rate("mx_p2p_read_bytes_total", "transport"), "{{transport}}")], "Bps"),
            Panel(
                "Loads from other workers",
                [(_rate("mx_p2p_source_attempts_total", "result"), "{{result}}")],
                "ops",
                "Every result but ok is a load that went on to another source, or failed.",
            ),
            Panel(
                "Duration of loads",
                [
                    (_p(0.5, "mx_p2p_transfer_seconds", "outcome"), "{{outcome}}, p50"),
                    (_p(0.95, "mx_p2p_transfer_seconds", "outcome"), "{{outcome}}, p95"),
                ],
                "s",
            ),
            Panel(
                "Chunks with a wrong digest",
                [(_rate("mx_p2p_digest_mismatches_total", "peer"), "{{peer}}")],
                "ops",
                "Damaged memory, or a network that changes bytes. Nothing of it was used.",
            ),
            Panel("Phases, p95", [(_p(0.95, "mx_p2p_phase_seconds", "phase"), "{{phase}}")], "s"),
            Panel(
                "Questions for sources",
                [(_rate("mx_p2p_list_sources_total", "result"), "{{result}}")],
                "ops",
            ),
        ),
    ),
    (
        "Workers that are read",
        (
            Panel("Bytes served", [(_rate("mx_p2p_served_bytes_total", "transport"), "{{transport}}")], "Bps"),
            Panel(
                "Leases",
                [
                    ("sum(mx_p2p_leases)", "held"),
                    (_rate("mx_p2p_leases_refused_total", "reason"), "refused: {{reason}}"),
                ],
            ),
            Panel(
                "Refused readers, and memory that is kept",
                [
                    (_rate("mx_p2p_grants_refused_total", "reason"), "grants refused: {{reason}}"),
                    ("sum by (transport) (mx_p2p_quarantined_bytes) / 1048576", "MiB kept: {{transport}}"),
                ],
                help="Memory is kept where a transfer that failed may still write to it.",
            ),
        ),
    ),
)


def dashboard() -> str:
    """The text of the dashboard."""
    return json.dumps(
        {
            "title": "ModelExpress",
            "uid": "modelexpress",
            "tags": ["modelexpress"],
            "schemaVersion": 39,
            "editable": True,
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "templating": {
                "list": [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}]
            },
            "panels": [{**panel, "id": number} for number, panel in enumerate(_panels(), 1)],
        },
        indent=1,
    )


def _panels() -> Iterator[dict[str, Any]]:
    y = 0
    for title, panels in ROWS:
        yield {"type": "row", "title": title, "collapsed": False, "gridPos": _place(0, y, _COLUMNS, 1), "panels": []}
        y += 1
        for position, panel in enumerate(panels):
            x = position * _WIDTH % _COLUMNS
            yield _panel(panel, _place(x, y, _WIDTH, _HEIGHT))
            if x + _WIDTH == _COLUMNS or position + 1 == len(panels):
                y += _HEIGHT


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + number), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
        for number, (expression, legend) in enumerate(panel.queries)
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def main() -> None:
    """Write the file."""
    PAGE.write_text(dashboard() + "\n")


if __name__ == "__main__":
    main()
