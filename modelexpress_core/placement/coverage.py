"""Whether every element of a model was written."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate

import torch

from modelexpress_core.placement.memory import Region, has_memory, region_of

__all__ = ["Coverage"]


class Coverage:
    """Which memory of the tensors of a model was written.

    Args:
        tensors: The tensors that have to be written, by name. Tensors that share memory are covered together. A tensor
            whose class hides its memory counts as written when it is written itself.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors: dict[str, _Covered] = {}
        self._unreachable: list[str] = []
        self._opaque: dict[int, list[str]] = {}
        by_memory: dict[object, _Covered] = {}
        for name, tensor in tensors.items():
            if not has_memory(tensor):
                self._opaque.setdefault(id(tensor), []).append(name)
                continue
            if tensor.device.type == "meta" and tensor.numel():
                self._unreachable.append(name)
                continue
            region = region_of(tensor)
            if region is not None:
                key = (region.start, region.end, region.dims)
                self._tensors[name] = by_memory.setdefault(key, _Covered(region))
        self._by_start = sorted(by_memory.values(), key=lambda covered: covered.region.start)
        # One tensor may be inside another. The furthest end so far only rises, so it can be searched.
        self._furthest = list(accumulate((covered.region.end for covered in self._by_start), max))

    def wrote(self, tensor: torch.Tensor) -> None:
        """All elements of ``tensor`` were written, or will be before the load ends."""
        if not has_memory(tensor):
            self._opaque.pop(id(tensor), None)
            return
        if tensor.device.type == "meta":
            return
        region = region_of(tensor)
        if region is not None:
            self.wrote_region(region)

    def wrote_region(self, region: Region) -> None:
        """All bytes of ``region`` were written, or will be before the load ends."""
        for position in range(bisect_right(self._furthest, region.start), len(self._by_start)):
            covered = self._by_start[position]
            if covered.region.start >= region.end:
                break
            if covered.region.end > region.start:
                covered.add(region)

    def missing(self) -> tuple[str, ...]:
        """Names of the tensors that were not written, or only in part."""
        unwritten = [name for name, covered in self._tensors.items() if not covered.complete()]
        opaque = [name for names in self._opaque.values() for name in names]
        return tuple(sorted([*self._unreachable, *opaque, *unwritten]))


class _Covered:
    """The memory of one tensor, and which part of it was written.

    Writes without gaps are kept as intervals. A write with gaps turns them into a mask, which is exact for every
    pattern and takes one byte for each byte of the tensor.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self._intervals: list[tuple[int, int]] = []
        self._mask: torch.Tensor | None = None

    def add(self, region: Region) -> None:
        if self._mask is None and region.gapless and self.region.gapless:
            start, end = max(region.start, self.region.start), min(region.end, self.region.end)
            if self._intervals and self._intervals[-1][1] == start:
                self._intervals[-1] = (self._intervals[-1][0], end)
            else:
                self._intervals.append((start, end))
            return
        if self._mask is None:
            self._mask = torch.zeros(self.region.end - self.region.start, dtype=torch.bool, device="cpu")
            for start, end in self._intervals:
                self._mask[start - self.region.start : end - self.region.start] = True
        self._paint(self._mask, region)

    def _paint(self, mask: torch.Tensor, region: Region) -> None:
        if region.start >= self.region.start and region.end <= self.region.end:
            sizes, strides = zip(*region.dims, strict=True)
            mask.as_strided(sizes, strides, region.start - self.region.start).fill_(True)
            return
        # It extends past the tensor: paint it on a mask of its own size and take the common part.
        own_mask = torch.zeros(region.end - region.start, dtype=torch.bool, device="cpu")
        sizes, strides = zip(*region.dims, strict=True)
        own_mask.as_strided(sizes, strides).fill_(True)
        start, end = max(region.start, self.region.start), min(region.end, self.region.end)
        part = own_mask[start - region.start : end - region.start]
        mask[start - self.region.start : end - self.region.start] |= part

    def complete(self) -> bool:
        if self._mask is not None:
            sizes, strides = zip(*self.region.dims, strict=True)
            return bool(self._mask.as_strided(sizes, strides).all())
        position = self.region.start
        for start, end in sorted(self._intervals):
            if start > position:
                return False
            position = max(position, end)
        return position >= self.region.end
