"""Small tensors (scales, norms), fetched ahead in merged reads: computing with them then costs no round trip."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modelexpress_core.checkpoint import Checkpoint, TensorInfo
from modelexpress_core.placement.deferred import Source
from modelexpress_core.placement.plan import Copy
from modelexpress_core.resources import allocating

__all__ = ["prefetch_copies", "small_tensors"]

#: Tensors up to this size are fetched ahead ...
_SMALL_BYTES = 64 << 10
#: ... as long as they make up no more than this share of the checkpoint (a rank may not need all of them) ...
_SMALL_SHARE = 0.02
#: ... and no more than this much memory.
_SMALL_TOTAL_BYTES = 256 << 20

#: Each tensor begins at a multiple of this in the shared buffer: the largest alignment that a dtype needs.
_ALIGNMENT = 16


def small_tensors(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The tensors of ``checkpoint`` that are fetched ahead, smallest first."""
    left = min(_SMALL_TOTAL_BYTES, int(checkpoint.tensor_bytes * _SMALL_SHARE))
    small = []
    for info in sorted(checkpoint.tensors.values(), key=lambda info: info.length):
        if info.length > _SMALL_BYTES or info.length > left:
            break
        if info.length:
            left -= info.length
            small.append(info)
    return small


def prefetch_copies(sources: Sequence[Source]) -> list[Copy]:
    """Copies of ``sources`` to one buffer; each source gets its part of it and the ticket of its copy."""
    with allocating("the small tensors, which are fetched ahead"):
        buffer = torch.empty(sum(_aligned(source.info.length) for source in sources), dtype=torch.uint8, device="cpu")
    copies, position = [], 0
    for source in sources:
        length = source.info.length
        source.prefetched = buffer[position : position + length]
        stored = torch.empty(length, dtype=torch.uint8, device="meta")
        source.prefetch = copy = Copy(source.info, stored, source.prefetched)
        copies.append(copy)
        position += _aligned(length)
    return copies


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT
