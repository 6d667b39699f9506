"""How tensors lie in a worker's memory, and the digest that tells two layouts apart."""

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
