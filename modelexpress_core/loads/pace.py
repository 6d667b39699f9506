"""How fast each source of a load delivers, and how much work it gets."""

from __future__ import annotations

from collections import deque

__all__ = ["Pace", "batch_bytes", "is_too_slow"]

#: Arrivals within this time count, and at least so many.
_WINDOW_SECONDS = 1.0
_MIN_ARRIVALS = 4

#: The smallest batch; the first of a thread, whose source may be slow; the largest; and how long a batch should take.
_MIN_BATCH_BYTES = 64 << 10
_FIRST_BATCH_BYTES = 4 << 20
_MAX_BATCH_BYTES = 64 << 20
_BATCH_SECONDS = 0.15

#: A source is stopped if others read its ranges in less than this share of the time, and save this many seconds.
_MAX_TIME_SHARE = 0.5
_MIN_SAVED_SECONDS = 0.05


class Pace:
    """The rate of one source: the bytes of its last arrivals over the time that they took, silence included.

    Args:
        now: When its first read begins, on the clock of all calls.
    """

    def __init__(self, now: float) -> None:
        self._arrivals = deque([(now, 0)])
        self._bytes = 0

    def arrived(self, nbytes: int, now: float) -> None:
        """Count a range that arrived."""
        self._arrivals.append((now, nbytes))
        self._bytes += nbytes
        while len(self._arrivals) > _MIN_ARRIVALS + 1 and self._arrivals[1][0] < now - _WINDOW_SECONDS:
            self._arrivals.popleft()
            self._bytes -= self._arrivals[0][1]

    def rate(self, now: float) -> float | None:
        """Bytes per second; None before the first arrival."""
        seconds = now - self._arrivals[0][0]
        return self._bytes / max(seconds, 1e-9) if self._bytes else None

    def seconds_for(self, nbytes: int, now: float) -> float:
        """How long ``nbytes`` bytes take. Before the first arrival: as long as they have taken already."""
        rate = self.rate(now)
        return now - self._arrivals[0][0] if rate is None else nbytes / rate


def batch_bytes(rate: float | None, rates: float, left_bytes: int, threads: int) -> int:
    """Return how many bytes a thread of a source reads next.

    Each source gets work for the same short time, so that a slow one never holds much. Towards the end batches shrink,
    so that all sources end together.

    Args:
        rate: Rate of the source, in bytes per second; None if it is unknown.
        rates: Rate of all sources together.
        left_bytes: Bytes that no source reads yet.
        threads: How many threads read from each source.
    """
    if rate is None:
        wanted = min(_FIRST_BATCH_BYTES, left_bytes / threads / 2)
    else:
        share = rate / max(rate, rates)
        fair = left_bytes * share / threads / (1 if share == 1 else 2)
        wanted = min(rate * _BATCH_SECONDS / threads, fair, _MAX_BATCH_BYTES)
    return int(max(wanted, _MIN_BATCH_BYTES))


def is_too_slow(left_seconds: float, *, elsewhere_seconds: float) -> bool:
    """Whether the ranges that a source holds should be read from others.

    Args:
        left_seconds: How long the source still needs.
        elsewhere_seconds: How long the others need for the same ranges from their beginning.
    """
    saved = left_seconds - elsewhere_seconds
    return saved > _MIN_SAVED_SECONDS and elsewhere_seconds < _MAX_TIME_SHARE * left_seconds
