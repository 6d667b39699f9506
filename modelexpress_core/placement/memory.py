"""Addresses: which memory a tensor occupies, and which of several pieces of memory overlap."""

from __future__ import annotations

import ctypes
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Generic, TypeVar

import torch

from modelexpress_core.fetch import Ticket

__all__ = [
    "PLAIN_CLASSES",
    "PendingMemory",
    "Region",
    "bytes_at",
    "has_memory",
    "is_ordinary",
    "merged_dims",
    "pinned_memory",
    "region_of",
]

_memoryview_from_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memoryview_from_memory.restype = ctypes.py_object
_memoryview_from_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_PYBUF_WRITE = 0x200


def bytes_at(address: int, length: int) -> memoryview:
    """The ``length`` bytes of memory at ``address``, writable. Whoever uses them keeps their owner alive."""
    return _memoryview_from_memory(address, length, _PYBUF_WRITE)  # type: ignore[no-any-return]  # ctypes says Any


def pinned_memory(length: int) -> memoryview:
    """``length`` bytes of host memory that devices copy from without a copy in between."""
    buffer = torch.empty(length, dtype=torch.uint8, device="cpu", pin_memory=True)
    held = (ctypes.c_ubyte * length).from_address(buffer.data_ptr())
    held.owner = buffer  # type: ignore[attr-defined]  # what looks at the array keeps the memory
    return memoryview(held).cast("B")


def merged_dims(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """``(size, stride)`` pairs of the same elements in as few dimensions as possible, by falling stride."""
    dims = sorted(((size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1), key=_by_stride)
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _by_stride(dim: tuple[int, int]) -> int:
    return -dim[1]


class Region:
    """The memory of a strided tensor.

    Attributes:
        start: Address of its first byte.
        end: One past the address of its last.
        gapless: Whether every byte between start and end belongs to it.
    """

    __slots__ = ("_dims", "end", "gapless", "start")

    def __init__(self, start: int, end: int, dims: tuple[tuple[int, int], ...] | None = None) -> None:
        self.start = start
        self.end = end
        self._dims = dims
        self.gapless = dims is None or (len(dims) == 1 and dims[0][1] == 1)

    @property
    def dims(self) -> tuple[tuple[int, int], ...]:
        """``(size, stride)`` in bytes, by falling stride; one of stride 1 where the region has no gaps."""
        return ((self.end - self.start, 1),) if self._dims is None else self._dims

    def overlaps(self, other: Region) -> bool:
        """Whether a byte may belong to both. Never False where one does."""
        if self.end <= other.start or other.end <= self.start:
            return False
        if self.gapless and other.gapless:
            return True
        return not _apart_in_one_grid(self, other)


def _apart_in_one_grid(a: Region, b: Region) -> bool:
    """Whether both are boxes of one array (columns of one matrix, say) that share no byte.

    Both are described in the strides of the finer description; a box that leaves a row of the array is not one.
    """
    strides = sorted({1, *(stride for _, stride in (*a.dims, *b.dims))}, reverse=True)
    if any(larger % smaller for larger, smaller in pairwise(strides)):
        return False
    origin = min(a.start, b.start)
    boxes = []
    for region in (a, b):
        sizes = {stride: size for size, stride in region.dims}
        if len(sizes) < len(region.dims):
            return False
        rest, box = region.start - origin, []
        for level, stride in enumerate(strides):
            first, rest = divmod(rest, stride)
            count = sizes.get(stride, 1)
            limit = strides[level - 1] // stride if level else None
            if limit is not None and first + count > limit:
                return False
            box.append((first, first + count))
        boxes.append(box)
    return any(a_end <= b_first or b_end <= a_first for (a_first, a_end), (b_first, b_end) in zip(*boxes, strict=True))


#: Classes of tensors that torch itself makes: their attributes and operations mean what torch says.
PLAIN_CLASSES = frozenset({torch.Tensor, torch.nn.Parameter})

#: What torch looks at to choose an implementation, for tensors that are memory and nothing else, also those made in
#: inference mode. Whatever is unusual about a tensor (a lazy conjugate, sparse, nested, quantised, batched by vmap) is
#: in there too.
_ordinary_keys: set[int] = set()
_known_devices = {"meta"}  # has no memory


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is memory and nothing else, in short time; may be False for some that are."""
    if type(tensor) not in PLAIN_CLASSES:
        return False
    keys = torch._C._dispatch_keys(tensor).raw_repr()  # noqa: SLF001 - nothing else tells it as fast
    return keys in _ordinary_keys or _learned(tensor, keys)


def _learned(tensor: torch.Tensor, keys: int) -> bool:
    """Whether ``keys`` are those of ordinary tensors on the device of ``tensor``, which may not have been met yet."""
    device = tensor.device
    if device.type in _known_devices:
        return False
    with torch._C._DisableTorchDispatch():  # noqa: SLF001 - these tensors are none of the load's
        for inference in (False, True):
            with torch.inference_mode(mode=inference):
                sample = torch.empty(0, device=device)
                _ordinary_keys.add(torch._C._dispatch_keys(sample).raw_repr())  # noqa: SLF001 - as above
    _known_devices.add(device.type)
    return keys in _ordinary_keys


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a strided one whose memory is its own, not that of a wrapping class."""
    plain = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return plain and tensor.layout is torch.strided and not tensor.is_quantized


def region_of(tensor: torch.Tensor) -> Region | None:
    """The memory of ``tensor``; None where it has no element."""
    length = tensor.nbytes
    if not length:
        return None
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return Region(start, start + length)
    item = tensor.itemsize
    strides = tuple(tensor.stride())
    sizes = tuple(size if stride else 1 for size, stride in zip(tensor.shape, strides, strict=True))
    dims = merged_dims(sizes, strides)
    span = sum((size - 1) * stride for size, stride in dims) + 1
    in_bytes = merged_dims((*(size for size, _ in dims), item), (*(stride * item for _, stride in dims), 1))
    return Region(start, start + span * item, tuple(in_bytes) or ((1, 1),))


_T = TypeVar("_T", bound=Ticket)


class PendingMemory(Generic[_T]):
    """What is still to be written where: regions with their owners, looked up by overlap.

    Memory is cut into buckets, so that a lookup sees only what lies near; within a bucket regions are sorted.
    """

    _BUCKET_BITS = 24

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Region, _T]] = {}
        self._buckets: dict[int, _Bucket] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _buckets_of(self, region: Region) -> Sequence[int]:
        first, last = region.start >> self._BUCKET_BITS, (region.end - 1) >> self._BUCKET_BITS
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
    """The keys of regions that touch one piece of memory, sorted by where they start."""

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
