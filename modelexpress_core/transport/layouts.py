"""Layouts of the tensors in a worker's memory, and a digest that differs for different layouts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from modelexpress_core.contracts.transport import TensorLayout

if TYPE_CHECKING:
    import torch

__all__ = ["layout_digest", "tensor_layouts"]

_DIGEST_DIGITS = 16

#: What is equal for tensors of the same bytes of memory.
_MemoryKey: TypeAlias = "tuple[str, int, tuple[tuple[int, int], ...]]"


def layout_digest(tensors: Iterable[TensorLayout]) -> str:
    """Return 16 lower-case hex digits, which are equal for equal layouts in any order, and differ for others.

    They are the start of the SHA-256 of compact JSON: the sorted list of ``[name, shape, stride, dtype,
    same_memory_as]``. JSON marks the end of each string and list, so that different layouts never give the same text.
    """
    ordered = sorted(tensor.canonical for tensor in tensors)
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_DIGITS]


def tensor_layouts(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorLayout, ...]:
    """Return the layouts of tensors by name, for example of a model's parameters and buffers.

    Tensors are tied if they are the same bytes of memory, whatever their dtypes and the order of their dimensions.
    Equal content does not count. A read into one is a read into all.
    """
    first: dict[_MemoryKey, str] = {}
    for name in sorted(tensors):
        first.setdefault(_memory_key(name, tensors[name]), name)
    return tuple(
        TensorLayout(
            name,
            tensor.shape,
            tensor.stride(),
            str(tensor.dtype).removeprefix("torch."),
            "" if (owner := first[_memory_key(name, tensor)]) == name else owner,
        )
        for name, tensor in tensors.items()
    )


def _memory_key(name: str, tensor: torch.Tensor) -> _MemoryKey:
    """Return device, address and extents of the tensor, or a key from its name if it has no memory."""
    import torch

    has_memory = tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0
    address = tensor.data_ptr() if has_memory else 0
    return (str(tensor.device), address, _extents(tensor)) if address else (name, 0, ())


def _extents(tensor: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Distance in bytes and size of as few dimensions as describe the tensor's bytes, the smallest distance first."""
    itemsize = tensor.element_size()
    dims = sorted(
        (stride * itemsize, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride
    )
    found = [(1, itemsize)]
    for stride, size in dims:
        inner_stride, inner_size = found[-1]
        if size == 1:
            continue
        if stride == inner_stride * inner_size:
            found[-1] = (inner_stride, inner_size * size)
        else:
            found.append((stride, size))
    return tuple(found)
