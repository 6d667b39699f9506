"""Addresses: which memory a tensor occupies, and whether two pieces of memory overlap."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import torch

from modelexpress_core.placement.strides import collapse_dims, extent, once
from modelexpress_core.placement.torch_private import dispatch_keys, without_dispatch

__all__ = ["PLAIN_CLASSES", "Region", "bytes_at", "has_memory", "is_ordinary", "pinned_memory", "region_of"]

_memoryview_from_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memoryview_from_memory.restype = ctypes.py_object
_memoryview_from_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_PYBUF_WRITE = 0x200


def bytes_at(address: int, length: int) -> memoryview:
    """The ``length`` bytes of memory at ``address``, writable. The caller keeps their owner alive."""
    return _memoryview_from_memory(address, length, _PYBUF_WRITE)  # type: ignore[no-any-return]  # ctypes says Any


def pinned_memory(length: int) -> memoryview:
    """``length`` bytes of page-locked host memory, from which devices copy directly."""
    buffer = torch.empty(length, dtype=torch.uint8, device="cpu", pin_memory=True)
    held = (ctypes.c_ubyte * length).from_address(buffer.data_ptr())
    held.owner = buffer  # type: ignore[attr-defined]  # views of the array keep the memory alive
    return memoryview(held).cast("B")


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
        """``(size, stride)`` in bytes, by falling stride; one of stride 1 if the region has no gaps."""
        return ((self.end - self.start, 1),) if self._dims is None else self._dims

    def overlaps(self, other: Region) -> bool:
        """Whether a byte may belong to both. Never False where one does."""
        if self.end <= other.start or other.end <= self.start:
            return False
        if self.gapless and other.gapless:
            return True
        return not _apart_in_one_grid(self, other)


def _apart_in_one_grid(a: Region, b: Region) -> bool:
    """Whether both are boxes of one array (columns of one matrix, for example) that share no byte.

    The strides of both together describe the array. A region that extends past the end of a row is no box.
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

#: Dispatch keys of tensors that are memory and nothing else, also of those made in inference mode. Everything unusual
#: about a tensor (a lazy conjugate, sparse, nested, quantised, batched by vmap) adds a key.
_ordinary_keys: set[int] = set()
_known_devices = {"meta"}  # its tensors have no memory


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is memory and nothing else. Fast; may be False for tensors that are."""
    if type(tensor) not in PLAIN_CLASSES:
        return False
    keys = dispatch_keys(tensor).raw_repr()
    return keys in _ordinary_keys or _is_ordinary_on_new_device(tensor, keys)


def _is_ordinary_on_new_device(tensor: torch.Tensor, keys: int) -> bool:
    """The same for a tensor whose device may be seen for the first time: learns the keys of its ordinary tensors."""
    device = tensor.device
    if device.type in _known_devices:
        return False
    with without_dispatch():  # these samples are not part of the load
        for inference in (False, True):
            with torch.inference_mode(mode=inference):
                sample = torch.empty(0, device=device)
                _ordinary_keys.add(dispatch_keys(sample).raw_repr())
    _known_devices.add(device.type)
    return keys in _ordinary_keys


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a strided one whose memory is its own, not that of a wrapping class."""
    plain = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return plain and tensor.layout is torch.strided and not tensor.is_quantized


def region_of(tensor: torch.Tensor) -> Region | None:
    """The memory of ``tensor``; None if it has no element."""
    length = tensor.nbytes
    if not length:
        return None
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return Region(start, start + length)
    item = tensor.itemsize
    strides = tensor.stride()
    sizes = [*once(tensor.shape, strides), item]
    in_bytes = [*(stride * item for stride in strides), 1]
    dims = collapse_dims(sizes, in_bytes, in_bytes)
    return Region(start, start + extent(sizes, in_bytes), tuple((size, step) for size, step, _ in dims) or ((1, 1),))
