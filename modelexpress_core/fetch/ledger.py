"""The figures of one load: bytes planned, bytes arrived, requests and retries."""

from __future__ import annotations

import threading
import time
from collections import deque

from modelexpress_core.errors import IncompleteLoadError

__all__ = ["Ledger"]

#: The rate in progress events is an average over this time.
_WINDOW_SECONDS = 5.0


class Ledger:
    """Counters of one load. Thread-safe; every figure only grows.

    Attributes:
        planned_bytes: Bytes of all ranges handed to the engine.
        arrived_bytes: Bytes of the ranges that arrived and were delivered.
        requests: Reads sent to the storage.
        retries: Reads sent again.
        most_in_flight: Most batches of ranges under way at once.
        verified_files: Files whose digest was compared and is right.
        reread_bytes: Bytes read again to find and replace damaged ones.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.planned_bytes = 0
        self.arrived_bytes = 0
        self.requests = 0
        self.retries = 0
        self.most_in_flight = 0
        self.verified_files = 0
        self.reread_bytes = 0
        self._in_flight = 0
        self._recent: deque[tuple[float, int]] = deque()

    def plan(self, length: int) -> None:
        """``length`` more bytes are to be fetched."""
        with self._lock:
            self.planned_bytes += length

    def begin(self, requests: int) -> None:
        """A batch of ranges, each a request, is under way."""
        with self._lock:
            self.requests += requests
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)

    def end(self, arrived: int) -> None:
        """A batch is no longer under way; ``arrived`` is its length, or 0 if it failed."""
        now = time.monotonic()
        with self._lock:
            self._in_flight -= 1
            self.arrived_bytes += arrived
            self._recent.append((now, self.arrived_bytes))
            while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_SECONDS:
                self._recent.popleft()

    def sent_again(self) -> None:
        """A read is sent to the storage again."""
        with self._lock:
            self.requests += 1
            self.retries += 1

    def verified(self, files: int) -> None:
        """The digests of ``files`` files are right."""
        with self._lock:
            self.verified_files += files

    def read_again(self, length: int) -> None:
        """``length`` bytes were read again, because a digest was wrong."""
        with self._lock:
            self.reread_bytes += length

    def rate(self) -> float:
        """Bytes per second over the last few seconds; 0 while that is unknown."""
        with self._lock:
            if len(self._recent) < 2:
                return 0.0
            (start, before), (end, after) = self._recent[0], self._recent[-1]
        return (after - before) / (end - start) if end > start else 0.0

    def check(self) -> None:
        """Raise unless everything planned has arrived.

        Raises:
            IncompleteLoadError: Bytes are missing.
        """
        if self.arrived_bytes != self.planned_bytes:
            message = f"{self.planned_bytes - self.arrived_bytes} of {self.planned_bytes} planned bytes did not arrive"
            raise IncompleteLoadError(message, hint="this is a bug in ModelExpress; please report it")
