"""How long a read may go without a byte before it counts as stalled: learned from successful reads.

A connection that a server, a proxy or a firewall has dropped looks like a slow one. The duration of recent reads tells
them apart: a read that is silent for several times the duration of the slowest recent read is not slow. If everything
stalls at once, because a server restarts, a longer wait is right: each stall doubles the time, and each successful read
halves it again.
"""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["Patience"]

#: Silence is a stall after this many times the duration of the slowest recent read ...
_SLOWEST_FACTOR = 3.0
_RECENT_READS = 32
#: ... but not earlier than this: scheduling and retransmissions alone can take so long ...
_MIN_SECONDS = 2.0
#: ... and only once so many reads are known.
_MIN_READS = 8


class Patience:
    """How long reads of one load wait for their next byte. Thread-safe.

    Args:
        most_seconds: Upper bound, and the time while too few reads are known.
    """

    def __init__(self, most_seconds: float) -> None:
        self._most_seconds = most_seconds
        self._lock = threading.Lock()
        self._recent: deque[float] = deque(maxlen=_RECENT_READS)
        self._factor = 1.0
        self.seconds = most_seconds

    def completed(self, seconds: float) -> float:
        """A read returned all its bytes after ``seconds``. Returns how long reads may wait now."""
        with self._lock:
            self._recent.append(seconds)
            self._factor = max(1.0, self._factor / 2)
            return self._update()

    def stalled(self) -> float:
        """A read stalled. Returns how long reads may wait now."""
        with self._lock:
            self._factor = min(2 * self._factor, self._most_seconds / _MIN_SECONDS)
            return self._update()

    def _update(self) -> float:
        if len(self._recent) >= _MIN_READS:
            learned = max(_MIN_SECONDS, _SLOWEST_FACTOR * max(self._recent))
            self.seconds = min(self._most_seconds, self._factor * learned)
        return self.seconds
