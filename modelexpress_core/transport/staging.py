"""Pinned host memory through which bytes go between a device and a socket: a ring of a few pieces.

Untested on hardware; tests run it with the CPU as the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from modelexpress_core.transport.tensor_bytes import host_memory

__all__ = ["Staging"]

#: One piece is copied while another one is sent or received.
_PIECES = 2


class Staging:
    """A ring of pieces of host memory. For one thread at a time.

    Args:
        device: Where the tensors are.
        piece_bytes: Size of a piece.
    """

    def __init__(self, device: torch.device, *, piece_bytes: int) -> None:
        self._device = device
        self._piece_bytes = piece_bytes
        pinned = device.type == "cuda"
        self._ring = [torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(_PIECES)]
        self._copied: list[Callable[[], None]] = [_nothing] * _PIECES

    def copied_out(self, content: torch.Tensor) -> Iterator[memoryview]:
        """The bytes of ``content``, piece by piece; each is valid until the next one is asked for.

        Args:
            content: One dimension of uint8 on the device.
        """
        starts = range(0, len(content), self._piece_bytes)
        for number, start in enumerate(starts):
            if not number:
                self._copy_out(content, start, 0)
            if start + self._piece_bytes < len(content):
                self._copy_out(content, start + self._piece_bytes, (number + 1) % _PIECES)
            self._copied[number % _PIECES]()
            yield host_memory(self._ring[number % _PIECES])[: min(self._piece_bytes, len(content) - start)]

    def _copy_out(self, content: torch.Tensor, start: int, slot: int) -> None:
        part = content[start : start + self._piece_bytes]
        with torch.no_grad():
            self._ring[slot][: len(part)].copy_(part, non_blocking=True)
        self._copied[slot] = self._begun()

    def copy_in(self, destination: torch.Tensor, receive: Callable[[memoryview], None]) -> None:
        """Fill ``destination``, piece by piece; when it returns, all bytes are there.

        Args:
            destination: One dimension of uint8 on the device.
            receive: Fills the memory that it gets with the next bytes.
        """
        try:
            for number, start in enumerate(range(0, len(destination), self._piece_bytes)):
                slot = number % _PIECES
                self._copied[slot]()  # the piece that was in this memory
                part = destination[start : start + self._piece_bytes]
                receive(host_memory(self._ring[slot])[: len(part)])
                with torch.no_grad():
                    part.copy_(self._ring[slot][: len(part)], non_blocking=True)
                self._copied[slot] = self._begun()
        finally:
            for slot in range(_PIECES):
                self._copied[slot]()
                self._copied[slot] = _nothing

    def _begun(self) -> Callable[[], None]:
        """A function that waits for what was begun on the device until now."""
        if self._device.type != "cuda":
            return _nothing
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


def _nothing() -> None:
    """Wait for nothing: copies on the CPU have ended when they return."""
