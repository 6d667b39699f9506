"""Log lines, progress bar and metrics of a load."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from prometheus_client import CollectorRegistry

from modelexpress_core import LoadReport
from modelexpress_core.events import LoadFailed, LoadFinished, LoadProgress, LoadStarted
from modelexpress_core.report import SourceReport
from mx_vllm._metrics import LoadMetrics
from mx_vllm._watch import LoadWatch

_STARTED = LoadStarted("1", "s3://bucket/model", "mx-s3", files=4, tensors=291, checkpoint_bytes=16_060_000_000)
_PROGRESS = LoadProgress(
    "1",
    "s3://bucket/model",
    bytes_done=5_000_000_000,
    bytes_planned=8_000_000_000,
    planning_done=True,
    seconds=4,
    bytes_per_second=1_500_000_000,
    eta_seconds=2,
    retries=0,
    limiter="network",
)
_REPORT = LoadReport(
    uri="s3://bucket/model",
    storage={"plugin": "mx-s3", "version": "1"},
    tensors=291,
    tensors_in_checkpoint=291,
    files=4,
    bytes_needed=8_000_000_000,
    bytes_fetched=8_030_000_000,
    bytes_reread=0,
    bytes_materialised=12_000,
    header_bytes=1,
    seconds=6.0,
    phase_seconds={"open": 0.5, "load": 5.5},
    goodput_bytes_per_second=1_333_333_333,
    requests=1000,
    retries=3,
    concurrency=32,
    verified={"versions": 4, "sizes": 4, "digests": 0},
    materialised_operations={},
    meta_destinations=0,
    peak_rss_bytes=1,
)
_WORKER = SourceReport("grpc://worker:6555/source/worker", 1, 1.0)
_FAILED = LoadFailed("2", "file:///model", OSError(), seconds=2.0)


Watching = Callable[..., LoadWatch]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def clock() -> list[float]:
    """The time of the watches' clock; tests advance it."""
    return [100.0]


@pytest.fixture
def watching(registry: CollectorRegistry, clock: list[float]) -> Watching:
    """A function that makes watches with ``registry`` and ``clock``."""
    metrics = LoadMetrics(registry)

    def watching(**options: Any) -> LoadWatch:
        options = {"first_rank": True, "bar": True, **options}
        log = logging.getLogger("test_watch")
        watch = LoadWatch(log, "llama", metrics=lambda: metrics, clock=lambda: clock[0], **options)
        watch.why = "MX_MODEL_URI names it"
        return watch

    return watching


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "test_watch")


def test_log_lines_of_a_load(
    watching: Watching, registry: CollectorRegistry, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """There is a line at the start, one every ten seconds, and one at the end."""
    watch = watching()

    watch.mx_load_started(_STARTED)
    for second in range(25):
        clock[0] = 100.0 + second
        watch.mx_load_progress(_PROGRESS)
    watch.mx_load_finished(LoadFinished("1", _REPORT))

    start, first, second, summary = caplog.messages
    assert start.startswith("ModelExpress reads 291 tensors (16.06 GB in 4 files) from s3://bucket/model with mx-s3")
    assert start.endswith(", because MX_MODEL_URI names it")
    assert first == second == "ModelExpress has read 5.00 GB of 8.00 GB (1.50 GB/s, 2 s left, limited by network)"
    assert summary.startswith(
        "ModelExpress loaded s3://bucket/model: 8.03 GB fetched (8030000000 bytes), 8.00 GB needed"
    )
    assert summary.endswith(
        "12.00 kB materialised, verified: versions of 4 files, 1.33 GB/s, 3 retries, 6.00 s (open 0.50 s, load 5.50 s)"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"bytes_compared": 7_000_000_000, "bytes_compared_by_server": 1_000_000_000, "channel": "bulk channel"},
            "verified: 7.00 GB compared here and 1.00 GB by the server and versions of 4 files",
        ),
        ({"verified": {"digests": 4, "versions": 4}}, "verified: digests of 4 files and versions of 4 files"),
        ({"verified": {"sizes": 4}}, "verified: sizes"),
        ({"verified": {"digests": 9}, "sources": [_WORKER]}, "verified: digests of 9 chunks"),
        ({"verified": {"digests": 9}, "sources": [_WORKER] * 3}, "verified: digests of 9 chunks from 3 workers"),
        ({"verified": {}, "sources": [_WORKER]}, "verified: nothing"),
    ],
)
def test_the_summary_says_what_was_verified(
    changes: dict[str, Any], expected: str, watching: Watching, caplog: pytest.LogCaptureFixture
) -> None:
    """By the manifest of a cache, by digests of files, by workers, or by nothing but sizes."""
    watching().mx_load_finished(LoadFinished("1", attrs.evolve(_REPORT, **changes)))

    assert f", {expected}, 1.33 GB/s" in caplog.text
    assert ("over bulk channel" in caplog.text) == ("channel" in changes)


def test_other_ranks_log_only_their_summary(
    watching: Watching, registry: CollectorRegistry, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Source and progress are the same on all ranks, so only the first rank logs them."""
    watch = watching(first_rank=False)

    watch.mx_load_started(_STARTED)
    clock[0] += 60
    watch.mx_load_progress(_PROGRESS)
    watch.mx_load_finished(LoadFinished("1", _REPORT))

    [message] = caplog.messages
    assert message.startswith("ModelExpress loaded ")


def test_a_terminal_gets_a_bar(
    watching: Watching,
    registry: CollectorRegistry,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The bar replaces the progress lines, unless vLLM's use_tqdm_on_load is off."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for watch in (watching(), watching(bar=False)):
        watch.mx_load_started(_STARTED)
        watch.mx_load_progress(_PROGRESS)
        watch.mx_load_failed(LoadFailed("1", "s3://bucket/model", OSError(), seconds=1.0))

    shown = capsys.readouterr().err
    assert 1 == shown.count("\n")
    assert re.search(r"ModelExpress: +62%.*5\.00G/8\.00G.*limit: network", shown)


def test_metrics(watching: Watching, registry: CollectorRegistry) -> None:
    """Durations are counted by scheme and outcome, phases by phase, and bytes by kind."""
    watch = watching()

    watch.mx_load_finished(LoadFinished("1", _REPORT))
    watch.mx_load_failed(_FAILED)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"engine": "vllm", "model": "llama", **labels})

    assert 6.0 == value("mx_load_seconds_sum", scheme="s3", outcome="success")
    assert 2.0 == value("mx_load_seconds_sum", scheme="file", outcome="error")
    assert 0.5 == value("mx_load_phase_seconds_sum", scheme="s3", phase="open")
    assert 5.5 == value("mx_load_phase_seconds_sum", scheme="s3", phase="load")
    assert 8e9 == value("mx_load_bytes_total", scheme="s3", kind="needed")
    assert 8.03e9 == value("mx_load_bytes_total", scheme="s3", kind="fetched")
    assert 12e3 == value("mx_load_bytes_total", scheme="s3", kind="materialised")


def test_every_metric_is_documented(watching: Watching, registry: CollectorRegistry) -> None:
    """The README lists every metric with its labels."""
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(mx_load_\w+)` \| (.*?) \|", readme, re.MULTILINE))
    metrics = {
        f"{metric.name}_total" if metric.type == "counter" else metric.name: metric for metric in registry.collect()
    }

    assert metrics.keys() == table.keys()
    common = ["engine", "model", "scheme"]
    own = {"mx_load_seconds": "outcome", "mx_load_phase_seconds": "phase", "mx_load_bytes_total": "kind"}
    for name, label in own.items():
        assert [*common, label] == re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", table[name])), name
