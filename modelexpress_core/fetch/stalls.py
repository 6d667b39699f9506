"""How long a read may go without a byte before it counts as stalled: learned from the reads that go well.

A connection that a server, a proxy or a firewall has forgotten looks like one that is slow. What tells them apart is
how long reads take here: one that is silent for several times as long as the slowest of the last ones took as a whole
is not slow. Where everything stalls at once, because a server restarts, waiting longer is right: each stall doubles the
time, and each read that goes well takes that back.
"""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["Patience"]

#: Silence is a stall after this many times the slowest of the last reads ...
_TIMES = 3.0
_RECENT = 32
#: ... but not before this, which scheduling and retransmissions alone can take ...
_LEAST_SECONDS = 2.0
#: ... and nothing is concluded from fewer reads than these.
_ENOUGH = 8


class Patience:
    """How long reads of one load wait for their next byte. Thread-safe.

    Args:
        most_seconds: Never longer than this, and this while too little is known.
    """

    def __init__(self, most_seconds: float) -> None:
        self._most_seconds = most_seconds
        self._lock = threading.Lock()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._times = 1.0
        self.seconds = most_seconds

    def completed(self, seconds: float) -> float:
        """A read brought everything it was asked for in ``seconds``; how long others may wait now."""
        with self._lock:
            self._recent.append(seconds)
            self._times = max(1.0, self._times / 2)
            return self._changed()

    def stalled(self) -> float:
        """A read was given up for silence; how long others may wait now."""
        with self._lock:
            self._times = min(2 * self._times, self._most_seconds / _LEAST_SECONDS)
            return self._changed()

    def _changed(self) -> float:
        if len(self._recent) >= _ENOUGH:
            learned = max(_LEAST_SECONDS, _TIMES * max(self._recent))
            self.seconds = min(self._most_seconds, self._times * learned)
        return self.seconds
