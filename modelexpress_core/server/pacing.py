"""Lets other calls run while one works through a long list on the event loop."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

__all__ = ["Pacer", "merge_sorted"]

_T = TypeVar("_T")

#: How long one call works before others get their turn.
_SLICE_SECONDS = 0.001

#: Steps between two looks at the clock.
_STEPS = 32

#: Items that are sorted at once.
_PART = 512


class Pacer:
    """Divides a loop into slices of about a millisecond: ``await pacer.pause()`` at each step."""

    def __init__(self) -> None:
        self._steps = 0
        self._until = time.perf_counter() + _SLICE_SECONDS

    async def pause(self, steps: int = 1) -> None:
        """Let other tasks run if the slice is over; ``steps`` is how many were taken since the last call."""
        self._steps += steps
        if self._steps >= _STEPS:
            self._steps = 0
            if time.perf_counter() >= self._until:
                await asyncio.sleep(0)
                self._until = time.perf_counter() + _SLICE_SECONDS


async def merge_sorted(items: Sequence[_T], key: Callable[[_T], Any]) -> Iterator[_T]:
    """``items`` in the order of ``key``: parts are sorted one after the other, and merged as they are taken."""
    pacer = Pacer()
    parts = []
    for start in range(0, len(items), _PART):
        parts.append(sorted(items[start : start + _PART], key=key))
        await pacer.pause(_PART)
    return heapq.merge(*parts, key=key)
