"""Memory that reads may still write to: it is kept until they have ended, if need be until the process ends.

NIXL cannot take back a read that has begun: if the worker is stopped and goes on later, the bytes arrive even after the
handle was released and the memory deregistered. Only a final state of the read makes its memory free.

Between processes of one host without a fabric, the reading process writes the bytes itself, in calls of its agent. An
agent that is never called again writes nothing: it is kept for ever, and the memory of its reads is free.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from attrs import define

__all__ = ["QUARANTINE", "KeptMemory", "Quarantine", "quarantined_bytes"]

_log = logging.getLogger(__name__)


@define(eq=False)
class KeptMemory:
    """Memory of one session whose reads have not ended.

    Attributes:
        nbytes: How much.
        uri: Redacted URI of the worker.
        memory: Keeps it alive.
        has_ended: Whether all reads have ended.
        destroy: Frees what the session used.
    """

    nbytes: int
    uri: str
    memory: Any
    has_ended: Callable[[], bool]
    destroy: Callable[[], None]


class Quarantine:
    """Keeps memory that reads may still write to. Thread-safe.

    Attributes:
        total_bytes: How many bytes were ever kept.
    """

    def __init__(self) -> None:
        self.total_bytes = 0
        self._kept: list[KeptMemory] = []
        self._abandoned: list[Any] = []
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """How many bytes are kept now."""
        with self._lock:
            return sum(each.nbytes for each in self._kept)

    def keep(self, kept: KeptMemory) -> None:
        """Keep memory, and log it."""
        with self._lock:
            self._kept.append(kept)
            self.total_bytes += kept.nbytes
            nbytes = sum(each.nbytes for each in self._kept)
        _log.warning(
            "keeping %d bytes, because reads from %s have not ended and may still write to them; %d bytes are kept",
            kept.nbytes,
            kept.uri,
            nbytes,
        )

    def abandon(self, agent: Any, uri: str) -> None:  # noqa: ANN401 - whatever must not be destroyed
        """Keep an agent and its reads for ever, since only calls of them would write to memory.

        Args:
            agent: All of it.
            uri: Redacted URI of the worker.
        """
        with self._lock:
            self._abandoned.append(agent)
            count = len(self._abandoned)
        _log.warning("leaving the connection to %s as it is, because its reads do not end; %d are left", uri, count)

    @property
    def abandoned(self) -> int:
        """How many agents are kept for ever."""
        with self._lock:
            return len(self._abandoned)

    def release_ended(self) -> None:
        """Free the memory of reads that have ended since then."""
        with self._lock:
            ended = [each for each in self._kept if each.has_ended()]
            self._kept = [each for each in self._kept if each not in ended]
        for each in ended:
            each.destroy()


#: That of this process.
QUARANTINE = Quarantine()


def quarantined_bytes() -> int:
    """How many bytes of this process are kept now, after those were freed whose reads have ended; for metrics."""
    QUARANTINE.release_ended()
    return QUARANTINE.nbytes
