"""How tensors lie in a worker's memory, and the digest that tells two layouts apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen

if TYPE_CHECKING:
    import torch

__all__ = ["TensorLayout", "layout_digest", "tensor_layouts"]

_DIGEST_DIGITS = 16


def _integers(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(map(int, values))


@frozen(order=True)
class TensorLayout:
    """One tensor, without its content.

    Attributes:
        name: Name of the tensor.
        shape: Elements along each dimension.
        stride: Elements from one index to the next, along each dimension.
        dtype: Of the elements: ``"bfloat16"``.
        same_memory_as: The first name, in order, of the tensors that begin at the same byte; empty for that one itself.
    """

    name: str
    shape: tuple[int, ...] = field(converter=_integers)
    stride: tuple[int, ...] = field(converter=_integers)
    dtype: str
    same_memory_as: str = ""

    def __attrs_post_init__(self) -> None:
        if len(self.shape) != len(self.stride):
            message = f"{self.name} has {len(self.shape)} dimensions, and {len(self.stride)} strides"
            raise ValueError(message)

    @property
    def canonical(self) -> tuple[str, tuple[int, ...], tuple[int, ...], str, str]:
        """All that matters: strides along which nobody steps say nothing of where bytes lie."""
        empty = 0 in self.shape
        stride = tuple(0 if size <= 1 or empty else step for size, step in zip(self.shape, self.stride, strict=True))
        return self.name, self.shape, stride, self.dtype, self.same_memory_as


def layout_digest(tensors: Iterable[TensorLayout]) -> str:
    """16 lower-case hex digits, the same for the same tensors in any order and for nothing else.

    They begin the SHA-256 of compact JSON: the sorted list of ``[name, shape, stride, dtype, same_memory_as]``. JSON
    marks where each text and each list ends, so that nothing can move from one to the next unseen.
    """
    ordered = sorted(tensor.canonical for tensor in tensors)
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_DIGITS]


def tensor_layouts(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorLayout, ...]:
    """The layouts of tensors by name, parameters and buffers of a model for instance.

    Tied tensors are told from such as only have equal content: what is read into one of them is read into all.
    """
    first: dict[tuple[str, int], str] = {}
    for name in sorted(tensors):
        first.setdefault(_place(name, tensors[name]), name)
    return tuple(
        TensorLayout(
            name,
            tensor.shape,
            tensor.stride(),
            str(tensor.dtype).removeprefix("torch."),
            "" if (owner := first[_place(name, tensor)]) == name else owner,
        )
        for name, tensor in tensors.items()
    )


def _place(name: str, tensor: torch.Tensor) -> tuple[str, int]:
    """Where the tensor begins; what has no memory is a place of its own."""
    import torch

    has_memory = tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0
    address = tensor.data_ptr() if has_memory else 0
    return (str(tensor.device), address) if address else (name, 0)
