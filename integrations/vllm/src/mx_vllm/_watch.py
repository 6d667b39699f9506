"""Log lines of a load (the source and why it was chosen, progress, a summary), its progress bar, and its metrics."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from modelexpress_core.errors import ModelExpressError
from modelexpress_core.events import LoadFailed, LoadFinished, LoadProgress, LoadStarted
from modelexpress_core.hooks import hookimpl
from modelexpress_core.report import LoadReport, format_bytes, format_compared, format_files
from mx_vllm._hub_models import why_in_cache
from mx_vllm._metrics import LoadMetrics, load_metrics

__all__ = ["LoadWatch", "headline_of"]

#: Time between two progress lines, if there is no progress bar.
_LINE_SECONDS = 10.0


def headline_of(exc: BaseException) -> str:
    """Return what happened, on one line."""
    return exc.headline if isinstance(exc, ModelExpressError) else f"{type(exc).__name__}: {exc}"


class LoadWatch:
    """Observes loads, one after another.

    Args:
        log: Logger for the lines.
        model: vLLM's name of the model.
        first_rank: Whether to log the source and the progress, which only the first rank does.
        bar: Whether a progress bar may be shown on a terminal.
        metrics: Returns the metrics; None if there are none.
        clock: A monotonic clock, in seconds.

    Attributes:
        why: Why the place is read that was asked for.
    """

    def __init__(
        self,
        log: logging.Logger,
        model: str,
        *,
        first_rank: bool,
        bar: bool,
        metrics: Callable[[], LoadMetrics | None] = load_metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._log = log
        self._model = model
        self._first_rank = first_rank
        self._bar_allowed = bar
        self._bars: dict[str, Any] = {}
        self._logged_at: dict[str, float] = {}
        self._failed: list[str] = []
        self.why = ""

    @hookimpl
    def mx_load_started(self, event: LoadStarted) -> None:
        if not self._first_rank:
            return
        self._log.info(
            "ModelExpress reads %d tensors (%s in %s) from %s with %s, because %s",
            event.tensors,
            format_bytes(event.checkpoint_bytes),
            format_files(event.files),
            event.uri,
            event.provider,
            "; ".join([", and ".join(filter(None, [why_in_cache(event.uri, os.environ), self.why])), *self._failed]),
        )
        self._failed.clear()
        self._logged_at[event.load_id] = self._clock()
        if self._bar_allowed and sys.stderr.isatty():
            from tqdm import tqdm

            self._bars[event.load_id] = tqdm(desc="ModelExpress", unit="B", unit_scale=True, total=0)

    @hookimpl
    def mx_load_progress(self, event: LoadProgress) -> None:
        bar = self._bars.get(event.load_id)
        if bar is not None:
            bar.total = event.bytes_planned
            bar.set_postfix_str(f"limit: {event.limiter}" if event.limiter else "", refresh=False)
            bar.update(event.bytes_done - bar.n)
            return
        now = self._clock()
        if now - self._logged_at.get(event.load_id, now) < _LINE_SECONDS:
            return
        self._logged_at[event.load_id] = now
        left = "" if event.eta_seconds is None else f", {event.eta_seconds:.0f} s left"
        limit = f", limited by {event.limiter}" if event.limiter else ""
        self._log.info(
            "ModelExpress has read %s of %s%s (%s/s%s%s)",
            format_bytes(event.bytes_done),
            format_bytes(event.bytes_planned),
            "" if event.planning_done else " or more",
            format_bytes(event.bytes_per_second),
            left,
            limit,
        )

    @hookimpl
    def mx_load_finished(self, event: LoadFinished) -> None:
        self._ended(event.load_id)
        self._log.info("%s", _summary(event.report))
        metrics = self._metrics()
        if metrics is not None:
            metrics.loaded(self._model, event.report)

    @hookimpl
    def mx_load_failed(self, event: LoadFailed) -> None:
        self._ended(event.load_id)
        self._failed.append(f"{event.uri} was tried first: {headline_of(event.error)}")
        metrics = self._metrics()
        if metrics is not None:
            metrics.failed(self._model, event)

    def _ended(self, load_id: str) -> None:
        self._logged_at.pop(load_id, None)
        bar = self._bars.pop(load_id, None)
        if bar is not None:
            bar.close()


def _verified(report: LoadReport) -> str:
    """What was checked of the bytes that arrived."""
    digests, versions = report.verified.get("digests", 0), report.verified.get("versions", 0)
    if report.sources:
        workers = f" from {len(report.sources)} workers" if len(report.sources) > 1 else ""
        return f"digests of {digests} chunks{workers}" if digests else "nothing"
    parts = [
        format_compared(report.bytes_compared, report.bytes_compared_by_server).replace(", ", " and "),
        f"digests of {format_files(digests)}" if digests else "",
        f"versions of {format_files(versions)}" if versions else "",
    ]
    return " and ".join(filter(None, parts)) or "sizes"


def _summary(report: LoadReport) -> str:
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.phase_seconds.items())
    parts = (
        f"{format_bytes(report.bytes_fetched)} fetched ({report.bytes_fetched} bytes)",
        f"{format_bytes(report.bytes_needed)} needed",
        f"{format_bytes(report.bytes_materialised)} materialised",
        f"verified: {_verified(report)}",
        f"{format_bytes(report.goodput_bytes_per_second)}/s",
        f"{report.retries} retries",
        f"{report.seconds:.2f} s ({phases})",
        *([f"over {report.channel}"] if report.channel else []),
    )
    return f"ModelExpress loaded {report.uri}: {', '.join(parts)}"
