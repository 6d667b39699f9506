"""What the engine moves: ranges of files, and the destinations of their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelexpress_core.checkpoint import CheckpointFile

__all__ = ["Range", "Segment", "Ticket"]


class Ticket:
    """Something that is complete when all its segments have arrived.

    Attributes:
        remaining: Segments that have not arrived; counted by the engine.
        done: Whether everything arrived. Once true it stays true.
        stable: Whether nothing else writes to its destination, and nothing uses it, before the load ends: damaged bytes
            may then be delivered again.
        fresh: Whether nothing was ever written to its destination, so that its pages do not exist yet.
    """

    __slots__ = ("done", "fresh", "remaining", "stable")

    def __init__(self) -> None:
        self.remaining = 0
        self.done = False
        self.stable = False
        self.fresh = False


class Segment:
    """A contiguous range of a file and its destination.

    Attributes:
        offset: First byte in the file.
        length: Bytes.
        memory: Where they go, of exactly ``length`` bytes; None where ``consume`` is set.
        consume: Called with the bytes, in a buffer that is reused afterwards; None where ``memory`` is set.
        runs: For runs with gaps between them instead of a contiguous range: the length of a run, and the distance from
            the start of one to the start of the next. Such a segment is alone in its range. None otherwise.
        ticket: The ticket that this is a part of. It keeps the destination alive.
    """

    __slots__ = ("consume", "length", "memory", "offset", "runs", "ticket")

    def __init__(
        self,
        offset: int,
        length: int,
        ticket: Ticket,
        *,
        memory: memoryview | None = None,
        consume: Callable[[memoryview], None] | None = None,
        runs: tuple[int, int] | None = None,
    ) -> None:
        self.runs = runs
        self.offset = offset
        self.length = length
        self.ticket = ticket
        self.memory = memory
        self.consume = consume

    def deliver(self, content: memoryview) -> None:
        """Bring ``content``, the bytes of this segment, to their destination."""
        if self.consume is not None:
            self.consume(content)
        elif self.memory is not None:
            self.memory[:] = content


class Range:
    """One read: a contiguous range of one file, with the segments in it.

    If it is one segment with its own memory, the bytes are read directly there. Otherwise they go through a staging
    buffer, from which each segment takes its part; bytes between segments are dropped.
    """

    __slots__ = ("file", "length", "offset", "segments")

    def __init__(self, file: CheckpointFile, offset: int, length: int, segments: Sequence[Segment]) -> None:
        self.file = file
        self.offset = offset
        self.length = length
        self.segments = segments

    @property
    def direct(self) -> memoryview | None:
        """The destination, if the bytes can be read directly into it."""
        if len(self.segments) != 1:
            return None
        segment = self.segments[0]
        return segment.memory if segment.length == self.length else None
