"""From recorded copies to reads: which ranges of which files, and how their bytes get where they belong.

A copy says: these elements of a stored tensor (size, stride, offset) go to those of a destination. It becomes segments,
each a contiguous range of the file:

- a contiguous run of elements that is also contiguous at the destination, in the same dtype, in host memory: read
  straight into place, split at the chunk size;
- anything else (another dtype, a transposed or scattered destination, device memory): read into a staging buffer and
  copied from there by torch, in pieces that fit one;
- elements with gaps between them: one range over all of them where the gaps are shorter than what a request costs,
  separate ranges where they are longer, or many runs in one call where the storage offers it.

Segments of a file that lie close together then share one read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from modelexpress_core.checkpoint import CheckpointFile, TensorInfo
from modelexpress_core.errors import CheckpointError
from modelexpress_core.fetch import Range, Segment, Ticket
from modelexpress_core.placement.memory import bytes_at

__all__ = ["Copy", "ReadPlanner"]

#: (size, stride in the file, stride at the destination), both strides in elements.
_Dims = Sequence[tuple[int, int, int]]

#: One thread is handed small ranges together until they are worth this much of its time, in bytes.
_BATCH_BYTES = 256 << 10

#: Runs up to this length are read many at a time, where the storage can; so many bytes of them are one read.
_RUN_BYTES = 64 << 10
_RUNS_BYTES = 1 << 20

#: Reads of different tensors are joined across a gap only where they need this many times its bytes: parts of the
#: tensors between them belong to other ranks.
_NEEDED_PER_WASTED = 16


#: Bytes of an element -> a dtype of that size which torch copies as it is.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class Copy(Ticket):
    """Elements of a stored tensor that go to a destination.

    Attributes:
        info: The stored tensor.
        source: A meta tensor whose size, stride, offset and dtype say which of its bytes are meant.
        destination: A strided tensor of the same size, with memory.
        needed_bytes: Bytes of the elements meant.
    """

    __slots__ = ("destination", "info", "needed_bytes", "source")

    def __init__(self, info: TensorInfo, source: torch.Tensor, destination: torch.Tensor) -> None:
        super().__init__()
        self.info = info
        self.source = source
        self.destination = destination
        self.needed_bytes = source.nbytes


class ReadPlanner:
    """Makes reads of copies.

    Args:
        chunk_bytes: Largest range that is read at once, and what a staging buffer holds.
        request_cost_bytes: What one more request costs, in bytes that could be read in the same time.
        reads_runs: Whether the storage reads many short runs in one call.
        force_staging: Whether nothing is to be read straight into place.
    """

    def __init__(
        self, chunk_bytes: int, request_cost_bytes: int, *, reads_runs: bool = False, force_staging: bool = False
    ) -> None:
        self._reads_runs = reads_runs
        self._force_staging = force_staging
        self._chunk_bytes = chunk_bytes
        self._request_cost_bytes = request_cost_bytes
        # Beyond this, copying out of a shared read costs more than a request of its own.
        self._small_bytes = min(chunk_bytes, 8 * request_cost_bytes)

    def batches(self, copies: Iterable[Copy]) -> list[list[Range]]:
        """The reads for ``copies``, in batches that are worth handing to a thread."""
        by_file: dict[CheckpointFile, list[Segment]] = {}
        for copy in copies:
            by_file.setdefault(copy.info.file, []).extend(self._segments(copy))
        batches: list[list[Range]] = []
        for file, segments in by_file.items():
            segments.sort(key=_by_offset)
            batch: list[Range] = []
            worth = 0
            for range_ in self._ranges(file, segments):
                batch.append(range_)
                worth += range_.length + self._request_cost_bytes
                if worth >= _BATCH_BYTES:
                    batches.append(batch)
                    batch, worth = [], 0
            if batch:
                batches.append(batch)
        return batches

    # -- one copy -----------------------------------------------------------------------------------------------------

    def _segments(self, copy: Copy) -> Iterable[Segment]:
        source, destination = copy.source, copy.destination
        item = source.itemsize
        straight = destination.device.type == "cpu" and destination.dtype == source.dtype and not self._force_staging
        first = int(source.storage_offset()) * item
        whole = source.is_contiguous() and destination.is_contiguous()  # most are
        if whole:
            dims: _Dims = ((source.numel(), 1, 1),)
            span = copy.needed_bytes
        else:
            dims = _merged(source.shape, source.stride(), destination.stride())
            span = _span(dims) * item
        if first + span > copy.info.length:
            raise CheckpointError(
                f"a view of {copy.info.name} reaches to byte {first + span} of {copy.info.length}",
                file=copy.info.file.name,
                hint="this is a fault in the code that makes the view",
            )
        start = copy.info.offset + first
        if whole and straight and span <= self._chunk_bytes:  # the same as below, in a fraction of the time
            return (Segment(start, span, copy, memory=bytes_at(destination.data_ptr(), span)),)
        return self._split(_Pieces(copy, straight=straight), dims, start, 0, item)

    def _split(self, pieces: _Pieces, dims: _Dims, start: int, there: int, item: int) -> Iterator[Segment]:
        """Segments for the elements ``dims``, of which the first is byte ``start`` of the file."""
        if not dims or (len(dims) == 1 and dims[0][1] == 1):
            yield from self._run(pieces, dims, start, there, item)
            return
        size, stride, stride_there = dims[0]
        if self._reads_runs and self._is_many_runs(dims, item):
            yield from self._many_runs(pieces, dims, start, there, item)
            return
        if self._readable_through(dims, item):
            if _span(dims) * item <= self._chunk_bytes:
                yield pieces.staged(dims, start, there)
                return
            step = max(1, (self._chunk_bytes - _span(dims[1:]) * item) // (stride * item) + 1)
        else:
            step = 1
        for index in range(0, size, step):
            count = min(step, size - index)
            rest = dims[1:] if count == 1 else ((count, stride, stride_there), *dims[1:])
            yield from self._split(pieces, rest, start + index * stride * item, there + index * stride_there, item)

    def _is_many_runs(self, dims: _Dims, item: int) -> bool:
        """Whether these are short contiguous runs of the file, all as far apart from each other."""
        run = dims[1:]
        if len(run) > 1 or (run and run[0][1] != 1):
            return False
        short = _span(run) * item <= min(_RUN_BYTES, self._chunk_bytes)
        return short and not self._readable_through(dims, item)

    def _many_runs(self, pieces: _Pieces, dims: _Dims, start: int, there: int, item: int) -> Iterator[Segment]:
        """Segments of many runs each."""
        size, stride, stride_there = dims[0]
        count, _, inner_there = dims[1] if len(dims) > 1 else (1, 1, 1)
        step = max(1, min(_RUNS_BYTES, self._chunk_bytes) // (count * item))
        for index in range(0, size, step):
            packed = ((min(step, size - index), count, stride_there), (count, 1, inner_there))
            begin, position = start + index * stride * item, there + index * stride_there
            yield pieces.runs(packed, begin, position, stride * item)

    def _readable_through(self, dims: _Dims, item: int) -> bool:
        """Whether every gap between these elements is cheaper to read than to skip."""
        for level, (_, stride, _) in enumerate(dims):
            gap = (stride - _span(dims[level + 1 :])) * item
            if gap > self._request_cost_bytes:
                return False
        return True

    def _run(self, pieces: _Pieces, dims: _Dims, start: int, there: int, item: int) -> Iterator[Segment]:
        """Segments for a contiguous run of the file."""
        count, _, stride_there = dims[0] if dims else (1, 1, 1)
        make = pieces.straight if pieces.is_straight and stride_there == 1 else None
        step = max(1, self._chunk_bytes // item)
        for index in range(0, count, step):
            part = min(step, count - index)
            begin, position = start + index * item, there + index * stride_there
            if make is not None:
                yield make(part * item, begin, position)
            else:
                yield pieces.staged(((part, 1, stride_there),), begin, position)

    # -- one file -----------------------------------------------------------------------------------------------------

    def _ranges(self, file: CheckpointFile, segments: Iterable[Segment]) -> Iterator[Range]:
        """Reads for the segments of one file, sorted by offset."""
        shared: list[Segment] = []
        begin = end = needed = 0
        for segment in segments:
            if segment.length > self._small_bytes or segment.runs is not None:
                yield Range(file, segment.offset, segment.length, (segment,))
                continue
            reaches = max(end, segment.offset + segment.length)
            needed += segment.length
            gap = segment.offset - end
            worth = gap <= min(self._request_cost_bytes, needed // _NEEDED_PER_WASTED)
            if shared and worth and reaches - begin <= self._chunk_bytes:
                shared.append(segment)
                end = reaches
                continue
            if shared:
                yield Range(file, begin, end - begin, shared)
            shared, begin, end = [segment], segment.offset, segment.offset + segment.length
            needed = segment.length
        if shared:
            yield Range(file, begin, end - begin, shared)


def _by_offset(segment: Segment) -> int:
    return segment.offset


def _merged(sizes: Sequence[int], strides: Sequence[int], there: Sequence[int]) -> _Dims:
    """The same elements in as few dimensions as possible, by falling stride in the file."""
    dims = sorted(
        ((size, s, d) for size, s, d in zip(sizes, strides, there, strict=True) if size != 1),
        key=lambda dim: -dim[1],
    )
    merged: list[tuple[int, int, int]] = []
    for size, s, d in dims:
        if merged and merged[-1][1] == size * s and merged[-1][2] == size * d:
            merged[-1] = (merged[-1][0] * size, s, d)
        else:
            merged.append((size, s, d))
    return merged


def _span(dims: _Dims) -> int:
    """Elements of the file from the first to the last of ``dims``."""
    return sum((size - 1) * stride for size, stride, _ in dims) + 1


class _Pieces:
    """Makes the segments of one copy."""

    def __init__(self, copy: Copy, *, straight: bool) -> None:
        self._copy = copy
        self._source_dtype = copy.source.dtype
        self._item = copy.source.itemsize
        self._address = copy.destination.data_ptr()
        self.is_straight = straight

    def straight(self, length: int, start: int, there: int) -> Segment:
        """``length`` bytes that go straight to element ``there`` of the destination's memory."""
        memory = bytes_at(self._address + there * self._item, length)
        return Segment(start, length, self._copy, memory=memory)

    def runs(self, dims: _Dims, start: int, there: int, stride_bytes: int) -> Segment:
        """Runs, each ``stride_bytes`` of the file after the one before; ``dims`` says where they go, read together."""
        (runs, count, stride_there), (_, _, inner_there) = dims
        length = runs * count * self._item
        run = (count * self._item, stride_bytes)
        if self.is_straight and inner_there == 1 and (stride_there == count or runs == 1):
            memory = bytes_at(self._address + there * self._item, length)
            return Segment(start, length, self._copy, memory=memory, runs=run)
        return Segment(start, length, self._copy, deliver=self._delivery(dims, there), runs=run)

    def staged(self, dims: _Dims, start: int, there: int) -> Segment:
        """The elements ``dims``, taken from a staging buffer to element ``there`` of the destination's memory."""
        length = _span(dims) * self._item
        return Segment(start, length, self._copy, deliver=self._delivery(dims, there))

    def _delivery(self, dims: _Dims, there: int) -> Callable[[memoryview], None]:
        destination, dtype = self._copy.destination, self._source_dtype
        if destination.dtype == dtype:  # copied as bits: torch copies no float4, for one
            dtype = _BITS[dtype.itemsize]
            destination = destination.view(dtype)
        sizes = [size for size, _, _ in dims]
        strides = [stride for _, stride, _ in dims]
        strides_there = [stride for _, _, stride in dims]

        def deliver(buffer: memoryview) -> None:
            # Inference mode: destinations may require gradients, or be tensors that only it may write. And classes
            # of parameters that have their own idea of torch functions are not asked.
            with torch.inference_mode(), torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch's documented way
                staged = _aligned(buffer, dtype).as_strided(sizes, strides)
                offset = destination.storage_offset() + there
                destination.as_strided(sizes, strides_there, offset).copy_(staged)

        return deliver


def _aligned(buffer: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """The elements in ``buffer``; copied first where they lie across the boundaries that their type asks for."""
    raw = torch.frombuffer(buffer, dtype=torch.uint8)
    if raw.data_ptr() % math.gcd(dtype.itemsize, 16):
        raw = raw.clone()
    return raw.view(dtype)
