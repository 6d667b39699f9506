"""Memory that is still to be written: regions with their owners, looked up by overlap."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Generic, TypeVar

from modelexpress_core.fetch import Ticket
from modelexpress_core.placement.memory import Region

__all__ = ["PendingMemory"]

_T = TypeVar("_T", bound=Ticket)


class PendingMemory(Generic[_T]):
    """Regions of memory that are still to be written, with their owners, looked up by overlap.

    Memory is cut into buckets, so that a lookup sees only near regions; within a bucket regions are sorted.

    Args:
        bucket_bits: A bucket has two to the power of this many bytes.
    """

    def __init__(self, bucket_bits: int = 24) -> None:
        self._bucket_bits = bucket_bits
        self._entries: dict[int, tuple[Region, _T]] = {}
        self._buckets: dict[int, _Bucket] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _buckets_of(self, region: Region) -> Sequence[int]:
        first, last = region.start >> self._bucket_bits, (region.end - 1) >> self._bucket_bits
        return (first,) if first == last else range(first, last + 1)

    def add(self, region: Region, owner: _T) -> None:
        """``owner`` will write ``region``."""
        key = self._next
        self._next += 1
        self._entries[key] = (region, owner)
        for number in self._buckets_of(region):
            bucket = self._buckets.get(number)
            if bucket is None:
                bucket = self._buckets[number] = _Bucket()
            bucket.add(region, key)

    def overlapping(self, region: Region) -> list[_T]:
        """The owners of regions that overlap ``region``, in the order in which they were added."""
        keys = self._keys(region)
        if len(keys) > 1:  # those that reach over several buckets are found in each
            keys = sorted(set(keys))
        return [self._entries[key][1] for key in keys]

    def owners(self) -> list[_T]:
        """All owners, in the order in which they were added."""
        return [owner for _, owner in self._entries.values()]

    def purge(self) -> None:
        """Forget every region whose owner is done."""
        left = [entry for entry in self._entries.values() if not entry[1].done]
        self._buckets, self._entries = {}, {}
        for region, owner in left:
            self.add(region, owner)

    def _keys(self, region: Region) -> list[int]:
        found: list[int] = []
        entries = self._entries
        for number in self._buckets_of(region):
            bucket = self._buckets.get(number)
            if bucket is not None:
                found += [key for key in bucket.near(region) if entries[key][0].overlaps(region)]
        return found


class _Bucket:
    """The keys of regions that touch one piece of memory, sorted by start."""

    __slots__ = ("keys", "longest", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.keys: list[int] = []
        self.longest = 0

    def add(self, region: Region, key: int) -> None:
        start = region.start
        position = bisect_right(self.starts, start)
        self.starts.insert(position, start)
        self.keys.insert(position, key)
        self.longest = max(self.longest, region.end - start)

    def near(self, region: Region) -> list[int]:
        """The keys of all regions that may overlap ``region``, and of a few others."""
        first = bisect_right(self.starts, region.start - self.longest)
        return self.keys[first : bisect_left(self.starts, region.end, first)]
