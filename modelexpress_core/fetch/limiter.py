"""What limits a load at the moment, judged by the time that its threads and the processors spend."""

from __future__ import annotations

import os
import threading
import time
from typing import Literal

from attrs import evolve, frozen

__all__ = ["Limiter", "Usage", "UsageMeter"]

#: What limits a load; empty while that is unknown.
#: source: the storage throttles, or fails so often that retries are most of the work.
#: network: reads wait for bytes, from the network or the storage behind it.
#: cpu: the processors are busy.
#: destination: bytes wait for staging buffers, or for being copied to their destination.
#: planning: the loading code asks for weights more slowly than they arrive.
Limiter = Literal["", "source", "network", "cpu", "destination", "planning"]

#: Share of the processors' time above which they are the limit.
_BUSY_CPU_SHARE = 0.85
#: Share of the time above which an activity is the limit.
_DOMINANT_SHARE = 0.5
#: Failures of the storage, as a share of requests, above which it is the limit.
_FAILING_SHARE = 0.25


@frozen
class Usage:
    """What a load has used since it began.

    Attributes:
        wall_seconds: Elapsed time.
        cpu_seconds: Processor time of this process, on all processors.
        reading_seconds: Time of all threads in reads of the storage.
        delivering_seconds: Time of all threads waiting for staging buffers, and copying from them.
        requests: Reads sent.
        failures: Reads that failed.
        throttled: Times that the storage asked for fewer requests.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    reading_seconds: float = 0.0
    delivering_seconds: float = 0.0
    requests: int = 0
    failures: int = 0
    throttled: int = 0

    def limiter(self, before: Usage, *, processors: int) -> Limiter:
        """The limit between ``before`` and now."""
        wall = self.wall_seconds - before.wall_seconds
        reading = self.reading_seconds - before.reading_seconds
        delivering = self.delivering_seconds - before.delivering_seconds
        requests = self.requests - before.requests
        if wall <= 0 or not requests:
            return ""
        if self.throttled > before.throttled or self.failures - before.failures > _FAILING_SHARE * requests:
            return "source"
        if delivering > _DOMINANT_SHARE * (reading + delivering):
            return "destination"
        if self.cpu_seconds - before.cpu_seconds > _BUSY_CPU_SHARE * processors * wall:
            return "cpu"
        if reading + delivering < _DOMINANT_SHARE * wall:  # less than one thread was busy most of the time
            return "planning"
        return "network"


class UsageMeter:
    """Adds up what a load uses. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = time.monotonic(), time.process_time()
        self._used = Usage()
        self._before = Usage()
        self._last: Limiter = ""
        self._processors = len(os.sched_getaffinity(0))

    def add(
        self,
        *,
        reading_seconds: float = 0.0,
        delivering_seconds: float = 0.0,
        requests: int = 0,
        failures: int = 0,
        throttled: int = 0,
    ) -> None:
        """Add to what was used."""
        with self._lock:
            used = self._used
            self._used = evolve(
                used,
                reading_seconds=used.reading_seconds + reading_seconds,
                delivering_seconds=used.delivering_seconds + delivering_seconds,
                requests=used.requests + requests,
                failures=used.failures + failures,
                throttled=used.throttled + throttled,
            )

    def limiter(self) -> Limiter:
        """The limit since the last call; the same as then if nothing has happened since."""
        wall, cpu = (now - then for now, then in zip((time.monotonic(), time.process_time()), self._begun, strict=True))
        with self._lock:
            now = evolve(self._used, wall_seconds=wall, cpu_seconds=cpu)
            self._last = now.limiter(self._before, processors=self._processors) or self._last
            self._before = now
            return self._last
