"""Tensors as a bulk server sends them: their memory on the host, or copies of that on a device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from modelexpress_core.bulk.serving import PIECE_BYTES
from modelexpress_core.transport.staging import Staging
from modelexpress_core.transport.tensor_bytes import host_memory

__all__ = ["TensorContent"]

#: Threads that copy from devices at the same time: each needs pinned memory.
_MAX_STAGING = 8

_staging = threading.BoundedSemaphore(_MAX_STAGING)


class TensorContent:
    """The memory of a tensor.

    Args:
        tensor: One dimension of uint8.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return len(self._tensor)

    @contextlib.contextmanager
    def pieces(self, start: int, end: int) -> Iterator[Iterator[memoryview]]:
        """The memory itself, or copies of that of a device."""
        part = self._tensor[start:end]
        if part.device.type == "cpu":
            yield _cut(host_memory(part))
            return
        with _staging:
            yield Staging(part.device, piece_bytes=PIECE_BYTES).copied_out(part)


def _cut(memory: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(memory), PIECE_BYTES):
        yield memory[start : start + PIECE_BYTES]
