"""How tensors lie in a worker's memory, and the digest that tells two layouts apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import attrs
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
    """

    name: str
    shape: tuple[int, ...] = field(converter=_integers)
    stride: tuple[int, ...] = field(converter=_integers)
    dtype: str


def layout_digest(tensors: Iterable[TensorLayout]) -> str:
    """16 lower-case hex digits, the same for the same tensors in any order and for nothing else.

    They begin the SHA-256 of compact JSON: the sorted list of ``[name, shape, stride, dtype]``. JSON marks where each
    text and each list ends, so that nothing can move from one to the next unseen.
    """
    ordered = [attrs.astuple(tensor) for tensor in sorted(tensors)]
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_DIGITS]


def tensor_layouts(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorLayout, ...]:
    """The layouts of tensors by name, parameters and buffers of a model for instance."""
    return tuple(
        TensorLayout(name, tensor.shape, tensor.stride(), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    )
