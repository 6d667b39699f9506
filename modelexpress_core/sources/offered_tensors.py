"""The tensors of one offer as readers see them: their layouts, their bytes, and the digests of these."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from modelexpress_core.contracts.transport import TensorLayout
from modelexpress_core.errors import PlacementError
from modelexpress_core.transport.layouts import tensor_layouts
from modelexpress_core.wire.proto.modelexpress import peer_pb2

if TYPE_CHECKING:
    import torch

__all__ = ["OfferedTensors"]

#: Tensors with gaps between their elements are offered as copies, of so many bytes in all.
_MAX_COPIED_BYTES = 64 << 20

#: A page of descriptions ends with the tensor that reaches this.
_PAGE_BYTES = 1 << 20


class OfferedTensors:
    """The tensors of one offer. Thread-safe.

    Args:
        tensors: Parameters and buffers by name, on their final device.

    Attributes:
        layouts: The layout of each tensor.
        memory: The bytes of each tensor that has elements, and is not the same memory as another one: one dimension of
            uint8.

    Raises:
        PlacementError: A tensor has no memory, is not dense, or has gaps and is too large to be copied.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        from modelexpress_core.transport.tensor_bytes import bytes_of

        self.layouts: Sequence[TensorLayout] = sorted(tensor_layouts(tensors))
        self.memory: dict[str, torch.Tensor] = {}
        self._described: list[peer_pb2.TensorDescription] = []
        self._digested = threading.Event()
        copied = 0
        for layout in self.layouts:
            found = bytes_of(layout.name, tensors[layout.name])
            if layout.same_memory_as or not found.nbytes:
                continue
            if found.memory is None:
                copied += found.nbytes
                if copied > _MAX_COPIED_BYTES:
                    message = (
                        f"tensors with gaps between their elements, such as {layout.name}, have more than "
                        f"{_MAX_COPIED_BYTES >> 20} MiB, which is what is copied in order to offer them"
                    )
                    raise PlacementError(message, tensor=layout.name, hint="make them contiguous before they are used")
            self.memory[layout.name] = found.gathered()

    @property
    def nbytes(self) -> int:
        """How many bytes readers need."""
        return sum(memory.nbytes for memory in self.memory.values())

    @property
    def digested(self) -> bool:
        """Whether the digests are there."""
        return self._digested.is_set()

    def digest(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Take the digest of each chunk, unless ``stopped`` returns True between two tensors.

        Until the digests are there, readers are told to try again.
        """
        from modelexpress_core.transport.chunk_digests import chunk_digests

        described = []
        for layout in self.layouts:
            if stopped():
                return
            description = peer_pb2.TensorDescription(
                name=layout.name,
                shape=layout.shape,
                stride=layout.stride,
                dtype=layout.dtype,
                same_memory_as=layout.same_memory_as,
                digests=chunk_digests(self.memory[layout.name]) if layout.name in self.memory else (),
            )
            described.append(description)
        self._described = described
        self._digested.set()

    def page(self, first: int) -> peer_pb2.DescribeTensorsResponse:
        """The descriptions from tensor ``first`` on, of about a mebibyte; an empty page is beyond the last."""
        page = peer_pb2.DescribeTensorsResponse(total=len(self._described))
        nbytes = 0
        for description in self._described[first:]:
            page.tensors.append(description)
            nbytes += description.ByteSize()
            if nbytes >= _PAGE_BYTES:
                break
        return page
