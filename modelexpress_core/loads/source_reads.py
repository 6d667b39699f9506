"""What is read from one of several workers: what it holds, what it delivered, and how it ended."""

from __future__ import annotations

from collections import deque

from attrs import Factory, define, field

from modelexpress_core.errors import BackendError
from modelexpress_core.loads.pace import Pace
from modelexpress_core.loads.peer_chunks import ChunkRead
from modelexpress_core.loads.peer_source import LeaseEnd, PeerSource

__all__ = ["SourceReads"]


@define(eq=False)
class SourceReads:
    """What is read from one source. The lock of the reader guards it.

    Attributes:
        source: The worker.
        pace: How fast it delivers.
        again: Chunks that it reads once more, because their digests were wrong.
        held: Chunks that it reads now.
        delivered: Chunks that it delivered.
        threads: How many threads read from it.
        stopping: Whether it gets no more work.
        stopped: Whether nothing of it writes to a destination any more.
        error: Why it was stopped; None if it was slow, or is not needed any more.
        lease: What it says at the end of its lease.
        begun: When it began; on the clock of the reader, as the next three.
        progressed: When its last chunk arrived, or it took chunks after it had none.
        asked: When it has to have answered the last question whether it lives.
        ended: When its session was closed; None before.
        arrived_bytes: Bytes in place, with the right digests.
        reread_bytes: Bytes that arrived with wrong digests, or under a lease that had ended.
        mismatches: Chunks that did.
    """

    source: PeerSource
    begun: float
    pace: Pace = field(init=False, default=Factory(lambda self: Pace(self.begun), takes_self=True))
    progressed: float = field(init=False, default=Factory(lambda self: self.begun, takes_self=True))
    asked: float = field(init=False, default=float("-inf"))
    ended: float | None = field(init=False, default=None)
    again: deque[ChunkRead] = field(init=False, factory=deque)
    held: set[ChunkRead] = field(init=False, factory=set)
    delivered: list[ChunkRead] = field(init=False, factory=list)
    threads: int = field(init=False, default=0)
    stopping: bool = field(init=False, default=False)
    stopped: bool = field(init=False, default=False)
    error: BackendError | None = field(init=False, default=None)
    lease: LeaseEnd | None = field(init=False, default=None)
    arrived_bytes: int = field(init=False, default=0)
    reread_bytes: int = field(init=False, default=0)
    mismatches: int = field(init=False, default=0)

    @property
    def held_bytes(self) -> int:
        """Bytes of the chunks that it reads now."""
        return sum(len(chunk.destination) for chunk in self.held)
