"""The server's time."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Clock", "now_ms"]

#: The wall clock was set if it differs from the steady clock by more; a smaller difference is drift.
_CLOCK_STEP_MS = 1000.0


def now_ms() -> int:
    """Milliseconds since 1970: what answers carry, and the clock by which read grants expire."""
    return time.time_ns() // 1_000_000


class Clock:
    """The steady clock, and how its times show on the wall clock.

    Args:
        clock: Steady clock in seconds.
        wall_clock: Seconds since 1970.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._offset_ms = (wall_clock() - clock()) * 1000

    def now_ms(self) -> float:
        """The present time of the steady clock."""
        return self._clock() * 1000

    def offset_ms(self) -> float:
        """What to add to times of the steady clock, so that they are times of the wall clock as it is set now."""
        offset = (self._wall_clock() - self._clock()) * 1000
        if abs(offset - self._offset_ms) > _CLOCK_STEP_MS:
            self._offset_ms = offset
        return self._offset_ms

    def wall_ms(self) -> int:
        """The present time of the wall clock."""
        return int(self.now_ms() + self.offset_ms())

    def steady_ms(self, wall_ms: float) -> float:
        """A time of a wall clock on the steady clock, and no later than now: clocks of servers differ a little."""
        return min(self.now_ms(), wall_ms - self.offset_ms())
