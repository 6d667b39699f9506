"""Memory for bytes that cannot be read directly into place: bounded, and reused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

__all__ = ["StagingPool"]


def _host_memory(length: int) -> memoryview:
    return memoryview(bytearray(length))


class StagingPool:
    """Buffers of one size, together never more than the budget. Threads wait for a free one.

    Args:
        budget_bytes: Bytes of all buffers together.
        buffer_bytes: Size of a buffer, the largest range that can be staged.
        allocate: Makes a buffer: pinned memory for devices that copy from it.
    """

    def __init__(
        self,
        budget_bytes: int,
        buffer_bytes: int,
        allocate: Callable[[int], memoryview] = _host_memory,
    ) -> None:
        self.buffer_bytes = min(buffer_bytes, budget_bytes)
        self._allocate = allocate
        self._free: list[memoryview] = []
        self._unmade = max(1, budget_bytes // self.buffer_bytes)
        self._most_at_once = max(1, self._unmade // 2)
        self._changed = threading.Condition()

    def allocate_with(self, allocate: Callable[[int], memoryview]) -> None:
        """Make further buffers with ``allocate``; existing ones stay."""
        self._allocate = allocate

    @contextmanager
    def borrow(self, length: int) -> Iterator[memoryview]:
        """A buffer of ``length`` bytes, until the ``with`` block ends."""
        with self.borrow_several([length]) as (buffer,):
            yield buffer

    @contextmanager
    def borrow_several(self, lengths: Sequence[int]) -> Iterator[list[memoryview]]:
        """Buffers for the first of ``lengths``: one, and as many more as are free now, but at most half of all.

        A thread that has buffers never waits for another one. Otherwise all threads could wait for each other.
        """
        longest = max(lengths)
        if longest > self.buffer_bytes:
            message = f"{longest} bytes do not fit a staging buffer of {self.buffer_bytes}"
            raise ValueError(message)
        buffers: list[memoryview] = []
        with self._changed:
            while not self._free and not self._unmade:
                self._changed.wait()
            wanted = min(len(lengths), self._most_at_once)
            while self._free and len(buffers) < wanted:
                buffers.append(self._free.pop())
            new = min(wanted - len(buffers), self._unmade)
            self._unmade -= new
        try:
            while new:
                buffers.append(self._allocate(self.buffer_bytes))
                new -= 1
            yield [buffer[:length] for buffer, length in zip(buffers, lengths, strict=False)]
        finally:
            with self._changed:
                self._unmade += new
                self._free.extend(buffers)
                self._changed.notify(len(buffers) + new)
