"""Tensors as a bulk server sends them: their memory on the host, or copies of that on a device."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

from modelexpress_core.bulk.output import PIECE_BYTES, Output
from modelexpress_core.bulk.requests import Run
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

    def send(self, output: Output, run: Run) -> None:
        """Send the memory itself, or copies of that of a device."""
        for part in self._parts(run):
            if part.device.type == "cpu":
                output.write(host_memory(part))
                continue
            with _staging:
                for piece in Staging(part.device, piece_bytes=PIECE_BYTES).copied_out(part):
                    output.write(piece)

    def _parts(self, run: Run) -> Iterator[torch.Tensor]:
        """One tensor for a range; for many pieces, tensors in which they lie one after another."""
        per_part = max(1, PIECE_BYTES // run.length) if run.count > 1 else 1
        for first in range(0, run.count, per_part):
            start, count = run.offset + first * run.stride, min(per_part, run.count - first)
            if count == 1:
                yield self._tensor[start : start + run.length]
            else:
                lying = self._tensor[start:].as_strided((count, run.length), (run.stride, 1))
                yield lying.reshape(-1)

    def close(self) -> None:
        """Do nothing: the tensor belongs to the source."""
