"""The number of concurrent reads: found by measuring, below the bound that the user sets.

More reads hide more latency, until the network, the storage or the CPU is saturated. Beyond that they only cost memory
and processor time, because threads wait for each other. The number is doubled for as long as goodput rises. If the
first doubling does not raise goodput, it is halved for as long as goodput holds. Later it is raised a little now and
then, because networks change. If the storage throttles, it is lowered at once (additive increase, multiplicative
decrease).

A storage suggests the number to begin with, for the latency that its service usually has. If it answered faster while
the checkpoint was opened, there is little latency to hide, and the CPUs of this machine are the limit: fewer reads are
started then.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from attrs import frozen

from modelexpress_core.providers import StorageCapabilities
from modelexpress_core.settings import LoadSettings

__all__ = ["ConcurrencyLimit", "FixedConcurrency", "SelfTunedConcurrency", "concurrency_for"]

#: A doubling is kept if it multiplies goodput by at least this. It is measured twice before it is given up: the first
#: measurement includes connecting, and other work of the machine.
_MIN_DOUBLING_GAIN = 1.05
#: A small step up is kept if it multiplies goodput by at least this.
_MIN_STEP_GAIN = 1.04
#: A halving is kept if at least this share of goodput is left.
_MIN_HALVING_RATIO = 0.97
#: Halving is not tried earlier: a short load loses more by trying than it can gain.
_MIN_HALVING_SECONDS = 1.0
#: A measurement takes at least this long: shorter ones measure the scheduler, not the network.
_WINDOW_SECONDS = 0.05
#: Measurements between a small step up that was given up and the next.
_STEP_INTERVAL = 12
#: Throttling multiplies the limit by this, once in so many seconds.
_THROTTLED_RATIO = 0.7
_THROTTLED_SECONDS = 1.0
#: If a read was answered within this time, a load begins with at most so many reads per CPU, and no fewer than so many.
_NEAR_SECONDS = 0.01
_NEAR_READS_PER_CPU = 2
_LEAST_NEAR_READS = 4


class ConcurrencyLimit(Protocol):
    """Limits reads under way, and learns from those that arrive."""

    @property
    def reads(self) -> int:
        """Reads that may be under way now."""
        ...

    def arrived(self, length: int) -> None:
        """``length`` bytes have arrived."""
        ...

    def throttled(self) -> None:
        """The storage asked for fewer requests."""
        ...


@frozen
class FixedConcurrency:
    """A limit that never changes.

    Attributes:
        reads: Reads that may be under way.
    """

    reads: int

    def arrived(self, length: int) -> None:
        """Do nothing."""

    def throttled(self) -> None:
        """Do nothing."""


class SelfTunedConcurrency:
    """Searches for the fewest reads that give the highest goodput.

    Args:
        start: Reads to begin with.
        most: Upper bound on reads.
        clock: Returns the time in seconds.
    """

    def __init__(self, start: int, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._reads = max(1, min(start, most))
        self._start = self._reads
        self._doubling = True
        self._failed_once = False
        self._halving = False
        self._may_halve = False
        self._first: float | None = None
        self._kept = self._reads  # the number to return to if a trial is given up
        self._kept_rate = 0.0
        self._until_step = _STEP_INTERVAL
        self._throttled_at = float("-inf")
        self._begun: float | None = None
        self._bytes = 0
        self._count = 0
        self._ignored = 0  # arrivals of reads that began under the previous limit

    @property
    def reads(self) -> int:
        """Reads that may be under way now."""
        return self._reads

    def arrived(self, length: int) -> None:
        """Count ``length`` bytes, and adapt the limit when a measurement is complete."""
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
            self._adapt(rate)

    def throttled(self) -> None:
        """Lower the limit, at most once a second."""
        with self._lock:
            now = self._clock()
            if now - self._throttled_at < _THROTTLED_SECONDS:
                return
            self._throttled_at = now
            self._reads = self._kept = max(1, int(self._reads * _THROTTLED_RATIO))
            self._kept_rate = 0.0
            self._doubling = self._halving = self._may_halve = False
            self._until_step = _STEP_INTERVAL
            self._begin()

    def _begin(self, now: float | None = None) -> None:
        self._begun = now
        self._bytes = 0
        self._count = 0

    def _adapt(self, rate: float) -> None:
        if self._doubling:
            self._check_doubling(rate)
        elif self._halving:
            self._check_halving(rate)
        elif self._may_halve and self._clock() - (self._first or 0.0) >= _MIN_HALVING_SECONDS:
            self._may_halve, self._halving = False, True
            self._halve()
        elif self._reads > self._kept:  # a small step was tried
            if rate > self._kept_rate * _MIN_STEP_GAIN:
                self._kept, self._kept_rate, self._until_step = self._reads, rate, 1
            else:
                self._reads, self._until_step = self._kept, _STEP_INTERVAL
        else:
            # The current rate, smoothed, because networks change.
            self._kept_rate = rate if not self._kept_rate else 0.7 * self._kept_rate + 0.3 * rate
            self._until_step -= 1
            if self._until_step <= 0 and self._reads < self._most:
                self._reads = min(self._most, self._reads + max(1, self._reads // 4))
                self._begin()  # reads under way began under the old limit

    def _check_doubling(self, rate: float) -> None:
        raised = rate > self._kept_rate * _MIN_DOUBLING_GAIN
        if raised:
            self._kept, self._kept_rate = self._reads, rate
        if raised and self._reads < self._most:
            self._reads = min(self._most, 2 * self._reads)
            self._failed_once = False
            return
        if not raised and not self._failed_once:
            self._failed_once = True
            return
        self._doubling = False
        self._reads = self._kept
        # Only the start: smaller numbers than a doubled one were measured, and are worse.
        self._may_halve = self._kept == self._start > 1

    def _check_halving(self, rate: float) -> None:
        holds = rate >= self._kept_rate * _MIN_HALVING_RATIO
        if holds:
            self._kept, self._kept_rate = self._reads, max(rate, self._kept_rate)
        if holds and self._kept > 1:
            self._halve()
        else:
            self._halving = False
            self._reads = self._kept

    def _halve(self) -> None:
        """Try half of the kept number; reads under way began under the larger limit."""
        self._ignored = self._reads
        self._reads = self._kept // 2
        self._begin()


def concurrency_for(
    capabilities: StorageCapabilities,
    settings: LoadSettings,
    *,
    answer_seconds: float | None = None,
    cpus: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> ConcurrencyLimit:
    """The limit for one load: tuned from the storage's suggestion up to the lower of its bound and the user's.

    Args:
        capabilities: What the storage declares.
        settings: The user's bound.
        answer_seconds: How long the fastest read took so far; None if there was none.
        cpus: Number of CPUs that this process may use; by default asked for.
        clock: Returns the time in seconds.
    """
    start, most = capabilities.concurrency, capabilities.most_concurrency
    if answer_seconds is not None and answer_seconds < _NEAR_SECONDS:
        cpus = len(os.sched_getaffinity(0)) if cpus is None else cpus
        start = min(start, max(_LEAST_NEAR_READS, _NEAR_READS_PER_CPU * cpus))
    if settings.concurrency is not None:
        most = min(most, settings.concurrency)
    return SelfTunedConcurrency(start, most, clock)
