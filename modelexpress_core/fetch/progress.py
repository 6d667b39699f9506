"""Progress reports of loads and pulls: often enough for people, seldom enough to cost nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["ProgressReporter"]

_INTERVAL_SECONDS = 0.1


class ProgressReporter:
    """Calls ``report`` at most every tenth of a second, and from one thread at a time.

    Args:
        report: Reports how far the load is. Called by threads that fetch.
    """

    def __init__(self, report: Callable[[], None]) -> None:
        self._report = report
        self._reporting = threading.Lock()
        self._reported = time.monotonic()

    def arrived(self) -> None:
        """Something arrived: report it, unless the last report was a moment ago or is under way."""
        if time.monotonic() - self._reported < _INTERVAL_SECONDS or not self._reporting.acquire(blocking=False):
            return
        try:
            self.report_now()
        finally:
            self._reporting.release()

    def report_now(self) -> None:
        """Report, however recent the last report is."""
        self._reported = time.monotonic()
        self._report()
