"""How many reads are under way at once: found by measuring, under the bound that the user sets.

More reads hide more latency, until the network, the storage or the CPU is full; from there on they only cost memory,
patience, and processor time: threads wait for each other. So the number is doubled as long as that raises the goodput;
where that did not help even once, it is halved as long as that loses nothing. Then it is tried a little higher now and
then, because networks change. Where the storage says that it is asked too much, it is lowered at once (additive
increase, multiplicative decrease).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from attrs import frozen

from modelexpress_core.providers import StorageCapabilities
from modelexpress_core.settings import LoadSettings

__all__ = ["ConcurrencyLimit", "FixedConcurrency", "SelfTunedConcurrency", "concurrency_for"]

#: A doubling has paid if it raised the goodput by this part. It is measured twice before it counts as useless: what is
#: measured first includes connecting, and whatever else the machine does.
_PAYS = 1.05
#: A small step up has paid if it raised the goodput by this part.
_STEP_PAYS = 1.04
#: A halving has lost nothing if this part of the goodput is left.
_HOLDS = 0.97
#: Halving is not tried sooner: a short load loses more by trying than it could gain.
_SINKS_AFTER_SECONDS = 1.0
#: A measurement is at least this long: shorter ones say more of the scheduler than of the network.
_WINDOW_SECONDS = 0.05
#: Measurements between one small step up that did not pay and the next.
_PATIENCE = 12
#: What is left of the limit when the storage is asked too much, and how long that counts as one complaint.
_DECREASE = 0.7
_COMPLAINT_SECONDS = 1.0


class ConcurrencyLimit(Protocol):
    """Asked before each read, and told of what came of it."""

    @property
    def reads(self) -> int:
        """Reads that may be under way now."""
        ...

    def arrived(self, length: int) -> None:
        """``length`` bytes have arrived."""
        ...

    def throttled(self) -> None:
        """The storage said that it is asked too much."""
        ...


@frozen
class FixedConcurrency:
    """Always the same.

    Attributes:
        reads: Reads that may be under way.
    """

    reads: int

    def arrived(self, length: int) -> None:
        """Changes nothing."""

    def throttled(self) -> None:
        """Changes nothing."""


class SelfTunedConcurrency:
    """Looks for the fewest reads that give the highest goodput.

    Args:
        start: Reads to begin with.
        most: Reads that are never exceeded.
        clock: Seconds.
    """

    def __init__(self, start: int, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._reads = max(1, min(start, most))
        self._start = self._reads
        self._ramping = True
        self._doubted = False
        self._sinking = False
        self._may_sink = False
        self._first: float | None = None
        self._kept = self._reads  # what to go back to where a try does not pay
        self._kept_rate = 0.0
        self._until_try = _PATIENCE
        self._complained = float("-inf")
        self._begun: float | None = None
        self._bytes = 0
        self._count = 0
        self._ignored = 0  # arrivals of what began under the last limit

    @property
    def reads(self) -> int:
        """Reads that may be under way now."""
        return self._reads

    def arrived(self, length: int) -> None:
        """Count ``length`` bytes, and draw the conclusion where a measurement is complete."""
        with self._lock:
            if self._ignored:
                self._ignored -= 1
                return
            now = self._clock()
            if self._first is None:
                self._first = now
            if self._begun is None:
                self._begun = now
                return
            self._bytes += length
            self._count += 1
            seconds = now - self._begun
            if self._count < self._reads or seconds < _WINDOW_SECONDS:
                return
            rate = self._bytes / seconds
            self._begin(now)
            self._conclude(rate)

    def throttled(self) -> None:
        """Lower the limit; many complaints of one moment count as one."""
        with self._lock:
            now = self._clock()
            if now - self._complained < _COMPLAINT_SECONDS:
                return
            self._complained = now
            self._reads = self._kept = max(1, int(self._reads * _DECREASE))
            self._kept_rate = 0.0
            self._ramping = self._sinking = self._may_sink = False
            self._until_try = _PATIENCE
            self._begin()

    def _begin(self, now: float | None = None) -> None:
        self._begun = now
        self._bytes = 0
        self._count = 0

    def _conclude(self, rate: float) -> None:
        if self._ramping:
            self._ramp(rate)
        elif self._sinking:
            self._sink(rate)
        elif self._may_sink and self._clock() - (self._first or 0.0) >= _SINKS_AFTER_SECONDS:
            self._may_sink, self._sinking = False, True
            self._halve()
        elif self._reads > self._kept:  # a small step was tried
            if rate > self._kept_rate * _STEP_PAYS:
                self._kept, self._kept_rate, self._until_try = self._reads, rate, 1
            else:
                self._reads, self._until_try = self._kept, _PATIENCE
        else:
            # The rate of now, smoothed: networks change.
            self._kept_rate = rate if not self._kept_rate else 0.7 * self._kept_rate + 0.3 * rate
            self._until_try -= 1
            if self._until_try <= 0 and self._reads < self._most:
                self._reads = min(self._most, self._reads + max(1, self._reads // 4))
                self._begin()  # what is under way began under the old limit

    def _ramp(self, rate: float) -> None:
        paid = rate > self._kept_rate * _PAYS
        if paid:
            self._kept, self._kept_rate = self._reads, rate
        if paid and self._reads < self._most:
            self._reads = min(self._most, 2 * self._reads)
            self._doubted = False
            return
        if not paid and not self._doubted:
            self._doubted = True
            return
        self._ramping = False
        self._reads = self._kept
        # What is below a number that has paid was measured, and is less.
        self._may_sink = self._kept == self._start > 1

    def _sink(self, rate: float) -> None:
        lost_nothing = rate >= self._kept_rate * _HOLDS
        if lost_nothing:
            self._kept, self._kept_rate = self._reads, max(rate, self._kept_rate)
        if lost_nothing and self._kept > 1:
            self._halve()
        else:
            self._sinking = False
            self._reads = self._kept

    def _halve(self) -> None:
        """Try half of what is kept; what is under way began with more."""
        self._ignored = self._reads
        self._reads = self._kept // 2
        self._begin()


def concurrency_for(capabilities: StorageCapabilities, settings: LoadSettings) -> ConcurrencyLimit:
    """The limit for one load: tuned, from what the storage suggests up to its bound or the user's, the lower one."""
    most = capabilities.most_concurrency
    if settings.concurrency is not None:
        most = min(most, settings.concurrency)
    return SelfTunedConcurrency(capabilities.concurrency, most)
