"""What limits a load at the moment, told from where its threads and the processors spend their time."""

from __future__ import annotations

import os
import threading
import time
from typing import Literal

from attrs import evolve, frozen

__all__ = ["Limiter", "Usage", "UsageMeter"]

#: What limits a load; empty while that cannot be said.
#: source: the storage asks for fewer requests, or fails so often that trying again is most of the work.
#: network: reads wait for bytes, of the network or of what is behind it.
#: cpu: the processors are busy.
#: destination: bytes wait for staging buffers, or for being copied to where they belong.
#: planning: the code that loads asks for weights more slowly than they come.
Limiter = Literal["", "source", "network", "cpu", "destination", "planning"]

#: Shares above which a resource counts as the limit.
_BUSY_CPU = 0.85
_MOST = 0.5
#: Complaints and failures of the storage, as a share of requests, from which it is the limit.
_FAILING = 0.25


@frozen
class Usage:
    """What has been used up since a load began.

    Attributes:
        wall_seconds: Time.
        cpu_seconds: Time of all processors in this process.
        reading_seconds: Time of all threads in reads of the storage.
        placing_seconds: Time of all threads waiting for staging buffers, and copying from them.
        requests: Reads sent.
        failures: Reads that failed.
        complaints: Times that the storage asked for fewer requests.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    reading_seconds: float = 0.0
    placing_seconds: float = 0.0
    requests: int = 0
    failures: int = 0
    complaints: int = 0

    def limiter(self, before: Usage, *, processors: int) -> Limiter:
        """What was the limit between ``before`` and now."""
        wall = self.wall_seconds - before.wall_seconds
        reading = self.reading_seconds - before.reading_seconds
        placing = self.placing_seconds - before.placing_seconds
        requests = self.requests - before.requests
        if wall <= 0 or not requests:
            return ""
        if self.complaints > before.complaints or self.failures - before.failures > _FAILING * requests:
            return "source"
        if placing > _MOST * (reading + placing):
            return "destination"
        if self.cpu_seconds - before.cpu_seconds > _BUSY_CPU * processors * wall:
            return "cpu"
        if reading + placing < _MOST * wall:  # not even one thread was busy for most of the time
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
        placing_seconds: float = 0.0,
        requests: int = 0,
        failures: int = 0,
        complaints: int = 0,
    ) -> None:
        """Count what was used."""
        with self._lock:
            used = self._used
            self._used = evolve(
                used,
                reading_seconds=used.reading_seconds + reading_seconds,
                placing_seconds=used.placing_seconds + placing_seconds,
                requests=used.requests + requests,
                failures=used.failures + failures,
                complaints=used.complaints + complaints,
            )

    def limiter(self) -> Limiter:
        """What was the limit since this was last asked; what it was then, where nothing has happened since."""
        wall, cpu = (now - then for now, then in zip((time.monotonic(), time.process_time()), self._begun, strict=True))
        with self._lock:
            now = evolve(self._used, wall_seconds=wall, cpu_seconds=cpu)
            self._last = now.limiter(self._before, processors=self._processors) or self._last
            self._before = now
            return self._last
