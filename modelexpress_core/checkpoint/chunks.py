"""Where the chunks of a file begin: the pieces whose digests a manifest has (docs/manifest.md, format 1).

A chunk never crosses the border of a tensor, and large tensors are cut where tensor-parallel ranks cut them, so that a
rank which reads its own part of a tensor reads whole chunks and can compare their digests.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from attrs import frozen

from modelexpress_core.checkpoint.header import HeaderTensor

__all__ = ["LARGEST_CHUNK_BYTES", "PLAIN_CHUNK_BYTES", "SMALLEST_CHUNK_BYTES", "FileChunks", "block_bytes"]

#: A tensor of at most so many bytes is one chunk, and larger ones are not cut into smaller blocks.
SMALLEST_CHUNK_BYTES = 512 << 10

#: A tensor that does not divide into blocks of at most so many bytes is cut as other bytes are.
LARGEST_CHUNK_BYTES = 4 << 20

#: What is no tensor is cut every so many bytes.
PLAIN_CHUNK_BYTES = 1 << 20


def block_bytes(shape: Sequence[int], nbytes: int) -> int:
    """Size of the chunks of a tensor; the last one may be smaller.

    Args:
        shape: Sizes of its dimensions, none of which is zero.
        nbytes: Its bytes, at least one.
    """
    if nbytes <= SMALLEST_CHUNK_BYTES:
        return nbytes
    for dimension in range(max(len(shape) - 2, 0), -1, -1):
        # One index of each dimension before this one leaves `span` bytes, which `shape[dimension]` rows make up.
        outer = math.prod(shape[:dimension])
        span = nbytes // outer
        if nbytes % outer or (span < SMALLEST_CHUNK_BYTES and dimension):
            continue
        rows = shape[dimension] if shape else 1
        block = span
        while not rows % 2 and not block % 2 and block // 2 >= SMALLEST_CHUNK_BYTES:
            rows //= 2
            block //= 2
        return block if block <= LARGEST_CHUNK_BYTES else PLAIN_CHUNK_BYTES
    return PLAIN_CHUNK_BYTES


@frozen(eq=False)
class FileChunks:
    """The chunks of one file.

    Neighbouring chunks of one size are a region: a tensor, or bytes between tensors. The lists have an entry for each
    region, in the order of the file.

    Attributes:
        size: Length of the file in bytes.
        starts: First byte of each region.
        blocks: Size of its chunks; the last one ends with the region.
        numbers: Number of its first chunk.
        count: How many chunks the file has.
    """

    size: int
    starts: array[int]
    blocks: array[int]
    numbers: array[int]
    count: int

    @classmethod
    def of_file(cls, size: int, header_bytes: int = 0, tensors: Iterable[HeaderTensor] = ()) -> FileChunks:
        """The chunks of a file.

        Args:
            size: Length of the file.
            header_bytes: Bytes before those of the tensors: the length of the header, and the header.
            tensors: Its tensors, in the order of their bytes; none for files of another kind.
        """
        starts, blocks, numbers = array("Q"), array("Q"), array("Q")
        count = end = 0

        def add(start: int, stop: int, block: int) -> None:
            nonlocal count, end
            if stop > start:
                starts.append(start)
                blocks.append(block)
                numbers.append(count)
                count += -(-(stop - start) // block)
                end = stop

        for tensor in tensors:
            start, stop = header_bytes + tensor.begin, header_bytes + tensor.end
            if stop > start:
                add(end, start, PLAIN_CHUNK_BYTES)
                add(start, stop, block_bytes(tensor.shape, stop - start))
        add(end, size, PLAIN_CHUNK_BYTES)
        return cls(size, starts, blocks, numbers, count)

    def bounds(self, number: int) -> tuple[int, int]:
        """First byte and end of a chunk."""
        if not 0 <= number < self.count:
            message = f"there is no chunk {number} of {self.count}"
            raise IndexError(message)
        region = bisect_right(self.numbers, number) - 1
        start = self.starts[region] + (number - self.numbers[region]) * self.blocks[region]
        return start, min(start + self.blocks[region], self._end_of(region))

    def touching(self, start: int, end: int) -> range:
        """The numbers of the chunks that have a byte of ``start`` to ``end``, which is within the file."""
        if start >= end:
            return range(0)
        return range(self._number_at(start), self._number_at(end - 1) + 1)

    def within(self, start: int, end: int) -> range:
        """The numbers of the chunks whose bytes all lie in ``start`` to ``end``, which is within the file."""
        touching = self.touching(start, end)
        first, stop = touching.start, touching.stop
        if first < stop and self.bounds(first)[0] < start:
            first += 1
        if first < stop and self.bounds(stop - 1)[1] > end:
            stop -= 1
        return range(first, max(first, stop))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """First byte and end of each chunk, in their order."""
        for region, (start, block) in enumerate(zip(self.starts, self.blocks, strict=True)):
            end = self._end_of(region)
            for at in range(start, end, block):
                yield at, min(at + block, end)

    def _end_of(self, region: int) -> int:
        return self.starts[region + 1] if region + 1 < len(self.starts) else self.size

    def _number_at(self, position: int) -> int:
        region = bisect_right(self.starts, position) - 1
        return self.numbers[region] + (position - self.starts[region]) // self.blocks[region]
