"""The bytes of a tensor, in the order in which they lie in its memory.

Sources and readers hold tensors of the same layout, so both mean the same bytes by an offset. Elements that a tensor
repeats (a stride of 0) count once, and gaps between its elements do not count: they may be memory of another tensor.
"""

from __future__ import annotations

import ctypes

import torch
from attrs import frozen

from modelexpress_core.errors import PlacementError

__all__ = ["TensorBytes", "bytes_of", "host_memory"]


@frozen
class TensorBytes:
    """The bytes of one tensor.

    Attributes:
        nbytes: How many there are.
        memory: The tensor's memory itself: one dimension of uint8. None if there are gaps between the elements; then
            bytes are gathered from it and scattered to it.
    """

    _ordered: torch.Tensor
    nbytes: int
    memory: torch.Tensor | None

    def gathered(self) -> torch.Tensor:
        """All bytes, one after another: the memory itself, or a copy if it has gaps."""
        if self.memory is not None:
            return self.memory
        with torch.no_grad():
            return _flat(self._ordered.contiguous())

    def scatter(self, content: torch.Tensor) -> None:
        """Write all bytes; ``content`` has one dimension of uint8, and lies on any device."""
        with torch.no_grad():
            if self.memory is not None:
                self.memory.copy_(content)
                return
            typed = content.contiguous().clone() if content.storage_offset() % self._ordered.element_size() else content
            self._ordered.copy_(typed.view(self._ordered.dtype).view(self._ordered.shape))


def bytes_of(name: str, tensor: torch.Tensor) -> TensorBytes:
    """The bytes of ``tensor``.

    Raises:
        PlacementError: It is not dense (sparse, conjugate, negative), has no memory, or two of its elements overlap in
            part.
    """
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        message = f"{name} is not a dense tensor: its layout is {tensor.layout}, or it is a conjugate or negative view"
        raise PlacementError(message, tensor=name, hint="use dense tensors: call resolve_conj and resolve_neg first")
    if tensor.is_meta:
        message = f"{name} is on the meta device, which has no memory"
        raise PlacementError(message, tensor=name, hint="move the model to its final device first")
    ordered = _in_order_of_memory(tensor.detach())
    if _overlaps(ordered):
        message = f"elements of {name} share memory in part: its strides are {tuple(tensor.stride())}"
        raise PlacementError(message, tensor=name, hint="clone the tensor")
    dense = ordered.is_contiguous()
    return TensorBytes(ordered, ordered.numel() * ordered.element_size(), _flat(ordered) if dense else None)


def host_memory(content: torch.Tensor) -> memoryview:
    """The memory of one dimension of uint8 on the CPU, writable; it keeps the tensor alive."""
    held = (ctypes.c_ubyte * len(content)).from_address(content.data_ptr())
    held.owner = content  # type: ignore[attr-defined]  # views of the array keep the memory alive
    return memoryview(held).cast("B")


def _in_order_of_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A view with the largest stride first, in which each element that is repeated stands once."""
    for dimension in reversed(range(tensor.dim())):
        if tensor.stride(dimension) == 0 and tensor.shape[dimension] > 1 and tensor.numel():
            tensor = tensor.narrow(dimension, 0, 1)
    strides, shape = tensor.stride(), tensor.shape
    order = sorted(range(tensor.dim()), key=lambda each: (shape[each] > 1, -strides[each]))
    return tensor.permute(order)


def _overlaps(ordered: torch.Tensor) -> bool:
    """Whether elements of a tensor, whose largest stride comes first, lie within the span of their neighbours."""
    if not ordered.numel():
        return False
    span = 1
    for size, stride in reversed([*zip(ordered.shape, ordered.stride(), strict=True)]):
        if size > 1:
            if stride < span:
                return True
            span = (size - 1) * stride + span
    return False


def _flat(contiguous: torch.Tensor) -> torch.Tensor:
    # Not reshape: it keeps the stride of a single element, which may be 0, and torch then refuses a view as bytes.
    return contiguous.as_strided((contiguous.numel(),), (1,)).view(torch.uint8)
