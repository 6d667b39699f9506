"""Which memory a tensor occupies, worked out byte by byte."""

from __future__ import annotations

import itertools

import torch

__all__ = ["addresses"]


def addresses(t: torch.Tensor) -> set[int]:
    """Address of every byte of ``t``."""
    if not t.numel():
        return set()
    starts = [
        t.data_ptr() + t.itemsize * sum(i * s for i, s in zip(index, t.stride(), strict=True))
        for index in itertools.product(*map(range, t.shape))
    ]
    return {start + byte for start in starts for byte in range(t.itemsize)}
