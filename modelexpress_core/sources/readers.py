"""Who reads from a worker, and how fast: an entry for each lease, which is kept for a while after its end."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from attrs import define, frozen

from modelexpress_core.sources.metrics import worker_metrics

__all__ = ["Reader", "Readers"]

#: Readers that have ended are shown for a while, at most so many.
_MAX_ENDED = 64
_ENDED_SECONDS = 600.0


@frozen
class Reader:
    """One load that reads from this worker, or has.

    Attributes:
        name: Its host, and its name where readers are authenticated.
        transport: Scheme of the transport; empty until it connects.
        read_bytes: Bytes that it was sent, or that it says it has read over a transport whose reads this worker does
            not see.
        counted: Whether the worker counted the bytes; else the reader told them.
        seconds: How long it has read, or did.
        ended_seconds: How long ago it ended; None if it still reads.
    """

    name: str
    transport: str
    read_bytes: int
    counted: bool
    seconds: float
    ended_seconds: float | None


@define
class _Entry:
    name: str
    begun: float
    transport: str = ""
    sent_bytes: int = 0
    told_bytes: int = 0
    ended: float | None = None


class Readers:
    """The readers of one worker, by their leases. Thread-safe.

    Args:
        clock: A monotonic clock, in seconds.

    Attributes:
        offered_bytes: Bytes of all tensors. A reader cannot say that it has read more than twice as many: each chunk is
            read at most twice.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.offered_bytes = 0
        self._clock = clock
        self._reading: dict[str, _Entry] = {}
        self._ended: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, lease: str, name: str) -> None:
        """A reader has got a lease."""
        with self._lock:
            self._reading[lease] = _Entry(name, self._clock())

    def connected(self, lease: str, transport: str) -> None:
        """It reads over ``transport``."""
        with self._lock:
            if entry := self._reading.get(lease):
                entry.transport = transport

    def count_sent(self, transport: str, lease: str, nbytes: int) -> None:
        """The worker has sent it bytes; also those of a lease that has just ended count."""
        worker_metrics().served(transport, nbytes)
        with self._lock:
            if entry := self._reading.get(lease) or self._ended.get(lease):
                entry.transport = transport
                entry.sent_bytes += nbytes

    def told(self, lease: str, read_bytes: int) -> None:
        """It says how many bytes it has read so far."""
        with self._lock:
            entry = self._reading.get(lease)
            if entry is None:
                return
            more = min(read_bytes, 2 * self.offered_bytes) - entry.told_bytes
            if more <= 0:
                return
            entry.told_bytes += more
            transport = "" if entry.sent_bytes else entry.transport
        if transport:
            worker_metrics().served(transport, more)

    def end(self, lease: str) -> None:
        """The lease has ended."""
        with self._lock:
            entry = self._reading.pop(lease, None)
            if entry is None:
                return
            entry.ended = self._clock()
            self._ended[lease] = entry
            while len(self._ended) > _MAX_ENDED:
                self._ended.popitem(last=False)

    def listed(self) -> Sequence[Reader]:
        """Return those that read now, then those that have ended, the latest first."""
        now = self._clock()
        with self._lock:
            reading = [*self._reading.values()]
            ended = [
                each for each in self._ended.values() if each.ended is not None and now - each.ended < _ENDED_SECONDS
            ]
        return [self._reader(each, now) for each in (*reversed(reading), *reversed(ended))]

    @staticmethod
    def _reader(entry: _Entry, now: float) -> Reader:
        return Reader(
            name=entry.name,
            transport=entry.transport,
            read_bytes=entry.sent_bytes or entry.told_bytes,
            counted=bool(entry.sent_bytes),
            seconds=(now if entry.ended is None else entry.ended) - entry.begun,
            ended_seconds=None if entry.ended is None else now - entry.ended,
        )
