"""What a load reads from workers: the layouts that they must have, and each tensor cut into chunks with digests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import define

from modelexpress_core.contracts.transport import TensorLayout
from modelexpress_core.errors import NotFoundError, PlacementError, UnsupportedError
from modelexpress_core.messages import listed
from modelexpress_core.transport.layouts import tensor_layouts

if TYPE_CHECKING:
    import torch

    from modelexpress_core.sources.worker_client import Description
    from modelexpress_core.transport.tensor_bytes import TensorBytes

__all__ = ["COMPARE", "ChunkRead", "ReadPlan"]

COMPARE = "compare the tensors"

#: What a description of a tensor may have beyond the texts and numbers in it.
_DESCRIPTION_BYTES = 256


@define(eq=False)
class ChunkRead:
    """One chunk of a tensor.

    Attributes:
        name: Name of the tensor.
        offset: First byte.
        destination: Where its bytes go: one dimension of uint8.
        digest: CRC-64/NVME of its bytes, as the worker took it when it offered the tensor.
        wrong: How often it arrived with another digest from the source that reads it.
    """

    name: str
    offset: int
    destination: torch.Tensor
    digest: int
    wrong: int = 0


class ReadPlan:
    """The tensors of a destination, and the chunks to read into them.

    Args:
        tensors: The tensors as the engine uses them.
        uri: Redacted URI of the first worker, for messages.

    Attributes:
        layouts: Their layouts, in the order of their names.
        chunks: The chunks, once ``cut`` was called.
        tensors: How many tensors have bytes of their own.
        nbytes: Their bytes.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], uri: str) -> None:
        self.layouts: Sequence[TensorLayout] = sorted(tensor_layouts(tensors))
        self.chunks: list[ChunkRead] = []
        self.tensors = 0
        self.nbytes = 0
        self._destinations = tensors
        self._uri = uri
        self._digests: Mapping[str, tuple[int, ...]] = {}
        self._with_gaps: list[tuple[TensorBytes, torch.Tensor]] = []

    @property
    def most_description_bytes(self) -> int:
        """How many bytes the descriptions of a worker with the same layout can have."""
        from modelexpress_core.transport.chunk_digests import chunk_count

        def texts(layout: TensorLayout) -> int:
            return 4 * (len(layout.name) + len(layout.same_memory_as)) + 20 * len(layout.shape)

        return sum(
            _DESCRIPTION_BYTES + texts(layout) + 8 * chunk_count(self._destinations[layout.name].nbytes)
            for layout in self.layouts
        )

    def compare(self, described: Sequence[Description], *, uri: str, provider: str) -> None:
        """Compare the layouts of a worker with those of the destination.

        Raises:
            NotFoundError: They differ.
        """
        theirs = {each.layout.name: each.layout.canonical for each in described}
        ours = {layout.name: layout.canonical for layout in self.layouts}
        if ours == theirs and len(described) == len(self.layouts):
            return
        differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        raise NotFoundError(
            f"the worker holds {len(differing)} tensors in another layout, or not at all: {listed(differing)}",
            uri=uri,
            operation=COMPARE,
            provider=provider,
            cause="it runs another model, or another version of the engine",
            hint="compare the identities of both workers",
        )

    def has_digests_of(self, described: Sequence[Description]) -> bool:
        """Whether a worker with the same layout holds the bytes that the chunks were cut for."""
        return self._digests == {each.layout.name: each.digests for each in described}

    def cut(self, described: Sequence[Description]) -> None:
        """Cut each tensor into chunks, with the digests of the first worker.

        Tied tensors share memory, and are read once.

        Raises:
            NotFoundError: The number of digests of a tensor is wrong.
            UnsupportedError: The destination has a tensor without bytes of its own.
        """
        import torch

        from modelexpress_core.transport.chunk_digests import CHUNK_BYTES, chunk_count
        from modelexpress_core.transport.tensor_bytes import bytes_of

        self._digests = {each.layout.name: each.digests for each in described}
        for layout in self.layouts:
            tensor, digests = self._destinations[layout.name], self._digests[layout.name]
            try:
                place = bytes_of(layout.name, tensor)
            except PlacementError as exc:  # a checkpoint may be copied to it all the same
                raise UnsupportedError(exc.message, uri=self._uri, operation=COMPARE, hint=exc.hint) from exc
            expected = 0 if layout.same_memory_as else chunk_count(place.nbytes)
            if len(digests) != expected:
                reason = f"the worker gives {len(digests)} digests of {layout.name}, not {expected}"
                raise NotFoundError(reason, uri=self._uri, operation=COMPARE, peer_at_fault=True)
            if not expected:
                continue
            self.tensors += 1
            self.nbytes += place.nbytes
            memory = place.memory
            if memory is None:
                memory = torch.empty(place.nbytes, dtype=torch.uint8, device=tensor.device)
                self._with_gaps.append((place, memory))
            for number, digest in enumerate(digests):
                start = number * CHUNK_BYTES
                self.chunks.append(ChunkRead(layout.name, start, memory[start : start + CHUNK_BYTES], digest))

    def scatter(self) -> None:
        """Copy tensors with gaps between their elements into place, once all chunks have arrived."""
        for place, staged in self._with_gaps:
            place.scatter(staged)
