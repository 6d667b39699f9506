"""Layouts of the tensors in a worker's memory, and a digest that differs for different layouts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from modelexpress_core.contracts.transport import TensorLayout

if TYPE_CHECKING:
    import torch

__all__ = ["layout_digest", "tensor_layouts"]

_DIGEST_DIGITS = 16


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

    Tensors are tied if they start at the same address; equal content does not count. A read into one is a read into
    all.
    """
    first: dict[tuple[str, int], str] = {}
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


def _memory_key(name: str, tensor: torch.Tensor) -> tuple[str, int]:
    """Return device and address of the tensor, or a key from its name if it has no memory."""
    import torch

    has_memory = tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0
    address = tensor.data_ptr() if has_memory else 0
    return (str(tensor.device), address) if address else (name, 0)
