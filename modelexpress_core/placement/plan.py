"""From recorded copies to reads: which ranges of which files, and how their bytes get to their destinations.

A copy maps elements of a stored tensor (size, stride, offset) to elements of a destination. It becomes segments, each a
contiguous range of the file:

- a contiguous run of elements that is also contiguous at the destination, in the same dtype, in host memory: read
  directly into place, split at the chunk size;
- anything else (another dtype, a transposed or scattered destination, device memory): read into a staging buffer and
  copied from target by torch, in pieces that fit one;
- elements with gaps between them: one range over all of them if reading the gaps costs less than another request,
  otherwise separate ranges, or many runs in one call if the storage can do that.

Segments of a file that are close together then share one read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from modelexpress_core.checkpoint import CheckpointFile, TensorInfo
from modelexpress_core.errors import CheckpointError
from modelexpress_core.fetch import Range, Segment, Ticket
from modelexpress_core.placement.memory import bytes_at
from modelexpress_core.placement.strides import collapse_dims, extent_of
from modelexpress_core.placement.torch_private import DisableTorchFunctionSubclass

__all__ = ["Copy", "ReadPlanner"]

#: (size, stride in the file, stride at the destination), both strides in elements.
_Dims = Sequence[tuple[int, int, int]]

#: Small ranges go to a thread in batches that cost at least this much, in bytes that could be read in the same time.
_BATCH_COST_BYTES = 256 << 10

#: Runs up to this length are read many at a time, if the storage can; one read has this many bytes of them.
_MAX_RUN_BYTES = 64 << 10
_MAX_RUNS_BYTES = 1 << 20

#: Reads of different tensors are joined across a gap only if they need this many times its bytes: the gap usually
#: belongs to other ranks.
_MIN_NEEDED_PER_GAP = 16

#: Bytes of an element -> a dtype of that size, which torch copies bit by bit.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class Copy(Ticket):
    """Elements of a stored tensor that go to a destination.

    Attributes:
        info: The stored tensor.
        source: A meta tensor whose size, stride, offset and dtype select bytes of it.
        destination: A strided tensor of the same size, with memory.
        needed_bytes: Bytes of these elements.
    """

    __slots__ = ("destination", "info", "needed_bytes", "source")

    def __init__(self, info: TensorInfo, source: torch.Tensor, destination: torch.Tensor) -> None:
        super().__init__()
        self.info = info
        self.source = source
        self.destination = destination
        self.needed_bytes = source.nbytes


class ReadPlanner:
    """Turns copies into reads.

    Args:
        chunk_bytes: Largest range that is read at once, and size of a staging buffer.
        request_cost_bytes: Cost of one more request, in bytes that could be read in the same time.
        reads_runs: Whether the storage reads many short runs in one call.
        run_cost_bytes: Cost of one more run of such a call, likewise; None for that of a request.
        force_staging: Whether everything is read through staging buffers.
    """

    def __init__(
        self,
        chunk_bytes: int,
        request_cost_bytes: int,
        *,
        reads_runs: bool = False,
        run_cost_bytes: int | None = None,
        force_staging: bool = False,
    ) -> None:
        self._reads_runs = reads_runs
        self._force_staging = force_staging
        self._chunk_bytes = chunk_bytes
        self._request_cost_bytes = request_cost_bytes
        self._run_cost_bytes = request_cost_bytes if run_cost_bytes is None else run_cost_bytes
        # Beyond this, copying out of a shared read costs more than a separate request.
        self._small_bytes = min(chunk_bytes, 8 * request_cost_bytes)

    def batches(self, copies: Iterable[Copy]) -> list[list[Range]]:
        """The reads for ``copies``, in batches of a size that suits a thread."""
        by_file: dict[CheckpointFile, list[Segment]] = {}
        for copy in copies:
            by_file.setdefault(copy.info.file, []).extend(self._segments(copy))
        batches: list[list[Range]] = []
        for file, segments in by_file.items():
            segments.sort(key=_by_offset)
            batch: list[Range] = []
            cost = 0
            for range_ in self._ranges(file, segments):
                batch.append(range_)
                cost += range_.length + self._request_cost_bytes
                if cost >= _BATCH_COST_BYTES:
                    batches.append(batch)
                    batch, cost = [], 0
            if batch:
                batches.append(batch)
        return batches

    # -- one copy -----------------------------------------------------------------------------------------------------

    def _segments(self, copy: Copy) -> Iterable[Segment]:
        source, destination = copy.source, copy.destination
        item = source.itemsize
        direct = destination.device.type == "cpu" and destination.dtype == source.dtype and not self._force_staging
        first = int(source.storage_offset()) * item
        whole = source.is_contiguous() and destination.is_contiguous()  # most are
        if whole:
            dims: _Dims = ((source.numel(), 1, 1),)
            span = copy.needed_bytes
        else:
            dims = collapse_dims(source.shape, source.stride(), destination.stride())
            span = extent_of(dims) * item
        if first + span > copy.info.length:
            raise CheckpointError(
                f"a view of {copy.info.name} reaches to byte {first + span} of {copy.info.length}",
                file=copy.info.file.name,
                hint="fix the code that makes the view",
            )
        start = copy.info.offset + first
        if whole and direct and span <= self._chunk_bytes:  # a fast path with the same result
            return (Segment(start, span, copy, memory=bytes_at(destination.data_ptr(), span)),)
        return self._split(_Pieces(copy, direct=direct), dims, start, 0, item)

    def _split(self, pieces: _Pieces, dims: _Dims, start: int, target: int, item: int) -> Iterator[Segment]:
        """Segments for the elements ``dims``: from byte ``start`` of the file to element ``target`` of the memory."""
        if not dims or (len(dims) == 1 and dims[0][1] == 1):
            yield from self._run(pieces, dims, start, target, item)
            return
        size, stride, target_stride = dims[0]
        if self._reads_runs and self._is_many_runs(dims, item):
            yield from self._many_runs(pieces, dims, start, target, item)
            return
        if self._readable_through(dims, item, self._request_cost_bytes):
            if extent_of(dims) * item <= self._chunk_bytes:
                yield pieces.staged(dims, start, target)
                return
            step = max(1, (self._chunk_bytes - extent_of(dims[1:]) * item) // (stride * item) + 1)
        else:
            step = 1
        for index in range(0, size, step):
            count = min(step, size - index)
            rest = dims[1:] if count == 1 else ((count, stride, target_stride), *dims[1:])
            yield from self._split(pieces, rest, start + index * stride * item, target + index * target_stride, item)

    def _is_many_runs(self, dims: _Dims, item: int) -> bool:
        """Whether these are short contiguous runs of the file, at equal distances."""
        run = dims[1:]
        if len(run) > 1 or (run and run[0][1] != 1):
            return False
        short = extent_of(run) * item <= min(_MAX_RUN_BYTES, self._chunk_bytes)
        return short and not self._readable_through(dims, item, self._run_cost_bytes)

    def _many_runs(self, pieces: _Pieces, dims: _Dims, start: int, target: int, item: int) -> Iterator[Segment]:
        """Segments of many runs each."""
        size, stride, target_stride = dims[0]
        count, _, inner_target = dims[1] if len(dims) > 1 else (1, 1, 1)
        step = max(1, min(_MAX_RUNS_BYTES, self._chunk_bytes) // (count * item))
        for index in range(0, size, step):
            packed = ((min(step, size - index), count, target_stride), (count, 1, inner_target))
            begin, position = start + index * stride * item, target + index * target_stride
            yield pieces.runs(packed, begin, position, stride * item)

    @staticmethod
    def _readable_through(dims: _Dims, item: int, cost_bytes: int) -> bool:
        """Whether every gap between these elements costs less to read than to skip."""
        for level, (_, stride, _) in enumerate(dims):
            gap = (stride - extent_of(dims[level + 1 :])) * item
            if gap > cost_bytes:
                return False
        return True

    def _run(self, pieces: _Pieces, dims: _Dims, start: int, target: int, item: int) -> Iterator[Segment]:
        """Segments for a contiguous run of the file."""
        count, _, target_stride = dims[0] if dims else (1, 1, 1)
        make = pieces.direct if pieces.is_direct and target_stride == 1 else None
        step = max(1, self._chunk_bytes // item)
        for index in range(0, count, step):
            part = min(step, count - index)
            begin, position = start + index * item, target + index * target_stride
            if make is not None:
                yield make(part * item, begin, position)
            else:
                yield pieces.staged(((part, 1, target_stride),), begin, position)

    # -- one file -----------------------------------------------------------------------------------------------------

    def _ranges(self, file: CheckpointFile, segments: Iterable[Segment]) -> Iterator[Range]:
        """Reads for the segments of one file, sorted by offset."""
        shared: list[Segment] = []
        begin = end = needed = 0
        for segment in segments:
            if segment.length > self._small_bytes or segment.runs is not None:
                yield Range(file, segment.offset, segment.length, (segment,))
                continue
            stop = max(end, segment.offset + segment.length)
            needed += segment.length
            gap = segment.offset - end
            joins = gap <= min(self._request_cost_bytes, needed // _MIN_NEEDED_PER_GAP)
            if shared and joins and stop - begin <= self._chunk_bytes:
                shared.append(segment)
                end = stop
                continue
            if shared:
                yield Range(file, begin, end - begin, shared)
            shared, begin, end = [segment], segment.offset, segment.offset + segment.length
            needed = segment.length
        if shared:
            yield Range(file, begin, end - begin, shared)


def _by_offset(segment: Segment) -> int:
    return segment.offset


class _Pieces:
    """Makes the segments of one copy."""

    def __init__(self, copy: Copy, *, direct: bool) -> None:
        self._copy = copy
        self._source_dtype = copy.source.dtype
        self._item = copy.source.itemsize
        self._address = copy.destination.data_ptr()
        self.is_direct = direct

    def direct(self, length: int, start: int, target: int) -> Segment:
        """``length`` bytes that are read directly to element ``target`` of the destination's memory."""
        memory = bytes_at(self._address + target * self._item, length)
        return Segment(start, length, self._copy, memory=memory)

    def runs(self, dims: _Dims, start: int, target: int, stride_bytes: int) -> Segment:
        """Runs ``stride_bytes`` apart in the file, read together; ``dims`` says where they go."""
        (runs, count, target_stride), (_, _, inner_target) = dims
        length = runs * count * self._item
        run = (count * self._item, stride_bytes)
        if self.is_direct and inner_target == 1 and (target_stride == count or runs == 1):
            memory = bytes_at(self._address + target * self._item, length)
            return Segment(start, length, self._copy, memory=memory, runs=run)
        return Segment(start, length, self._copy, consume=self._scatter(dims, target), runs=run)

    def staged(self, dims: _Dims, start: int, target: int) -> Segment:
        """The elements ``dims``, copied from a staging buffer to element ``target`` of the destination's memory."""
        length = extent_of(dims) * self._item
        return Segment(start, length, self._copy, consume=self._scatter(dims, target))

    def _scatter(self, dims: _Dims, target: int) -> Callable[[memoryview], None]:
        destination, dtype = self._copy.destination, self._source_dtype
        if destination.dtype == dtype:  # copied as bits: torch does not copy float4, for example
            dtype = _BITS[dtype.itemsize]
            destination = destination.view(dtype)
        sizes = [size for size, _, _ in dims]
        strides = [stride for _, stride, _ in dims]
        target_strides = [stride for _, _, stride in dims]

        def scatter(buffer: memoryview) -> None:
            # Inference mode: destinations may require gradients, or be inference tensors. Subclasses of parameters
            # that override torch functions are bypassed.
            with torch.inference_mode(), DisableTorchFunctionSubclass():
                staged = _aligned(buffer, dtype).as_strided(sizes, strides)
                offset = destination.storage_offset() + target
                destination.as_strided(sizes, target_strides, offset).copy_(staged)

        return scatter


def _aligned(buffer: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """The elements in ``buffer``; copied first if they are not aligned as their dtype needs."""
    raw = torch.frombuffer(buffer, dtype=torch.uint8)
    if raw.data_ptr() % math.gcd(dtype.itemsize, 16):
        raw = raw.clone()
    return raw.view(dtype)
