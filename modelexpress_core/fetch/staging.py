"""Memory for bytes that cannot be read directly into place: bounded, and reused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
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
        self._changed = threading.Condition()

    def allocate_with(self, allocate: Callable[[int], memoryview]) -> None:
        """Make further buffers with ``allocate``; existing ones stay."""
        self._allocate = allocate

    @contextmanager
    def borrow(self, length: int) -> Iterator[memoryview]:
        """A buffer of ``length`` bytes, until the ``with`` block ends."""
        if length > self.buffer_bytes:
            message = f"{length} bytes do not fit a staging buffer of {self.buffer_bytes}"
            raise ValueError(message)
        with self._changed:
            while not self._free and not self._unmade:
                self._changed.wait()
            buffer = self._free.pop() if self._free else None
            self._unmade -= buffer is None
        if buffer is None:
            buffer = self._allocate(self.buffer_bytes)
        try:
            yield buffer[:length]
        finally:
            with self._changed:
                self._free.append(buffer)
                self._changed.notify()
