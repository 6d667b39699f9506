"""What every transport does: it makes the tensors of a worker readable, and reads those of another worker.

A reader compares, leases, reads and releases, in this order. This contract is a draft: it may change with the first
transport between processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from attrs import field, frozen

from modelexpress_core.contracts.candidates import Peer

if TYPE_CHECKING:
    import torch


__all__ = ["Completion", "PeerSession", "ServedTensors", "TensorLayout", "TensorRead", "TensorTable", "Transport"]


def _integers(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(map(int, values))


@frozen(order=True)
class TensorLayout:
    """Metadata of one tensor.

    Attributes:
        name: Name of the tensor.
        shape: Number of elements along each dimension.
        stride: Distance between neighbours along each dimension, in elements.
        dtype: Data type of the elements: ``"bfloat16"``.
        same_memory_as: Name of the first tensor that begins at the same byte, if it is another one; else empty.
    """

    name: str
    shape: tuple[int, ...] = field(converter=_integers)
    stride: tuple[int, ...] = field(converter=_integers)
    dtype: str
    same_memory_as: str = ""

    def __attrs_post_init__(self) -> None:
        if len(self.shape) != len(self.stride):
            message = f"{self.name} has {len(self.shape)} dimensions and {len(self.stride)} strides"
            raise ValueError(message)

    @property
    def canonical(self) -> tuple[str, tuple[int, ...], tuple[int, ...], str, str]:
        """The form in which layouts are compared: a stride that has no effect is 0."""
        empty = 0 in self.shape
        stride = tuple(0 if size <= 1 or empty else step for size, step in zip(self.shape, self.stride, strict=True))
        return self.name, self.shape, stride, self.dtype, self.same_memory_as


@frozen
class TensorTable:
    """The tensors that a worker makes readable.

    Attributes:
        source_id: The ``mx_source_id`` of the tensors' identity.
        worker_id: The worker that holds them.
        tensors: Parameters and buffers by name, on their device.
    """

    source_id: str
    worker_id: str
    tensors: Mapping[str, torch.Tensor] = field(repr=False)


@frozen
class TensorRead:
    """One tensor to read.

    Attributes:
        name: Name of the tensor at the peer.
        destination: Tensor of the same layout; the read writes to its memory.
    """

    name: str
    destination: torch.Tensor = field(repr=False)


@frozen
class Completion:
    """One successful read.

    Attributes:
        name: Name of the tensor. Every byte of it is in place.
        bytes: Number of bytes that were moved.
    """

    name: str
    bytes: int


class ServedTensors(Protocol):
    """Tensors that peers may read, until ``close``.

    Attributes:
        endpoint: Address that peers connect to: the authority of the worker's URI.
        topology: Entries that the worker publishes about this transport.
    """

    endpoint: str
    topology: Mapping[str, str]

    def drain(self, timeout_seconds: float) -> bool:
        """Grant no more leases, wait for those that are held, and return whether all were released in time."""
        ...

    def close(self) -> None:
        """Stop serving. Afterwards no peer reads this memory."""
        ...


class PeerSession(Protocol):
    """The connection of one reader to one worker.

    Attributes:
        layouts: Layouts of the worker's tensors. The reader compares them with its own.
    """

    layouts: Sequence[TensorLayout]

    def lease(self) -> None:
        """Take a lease: until ``release`` or ``close``, the worker does not change its memory.

        Raises:
            UnavailableError: The worker is about to change its memory.
            BackendError: Any other failure.
        """
        ...

    def read(self, reads: Sequence[TensorRead]) -> Iterator[Completion]:
        """Read tensors straight into their destinations. Yields each once, in any order, when it is in place.

        Raises:
            BackendError: During iteration. The content of destinations that were not yielded is undefined then. The
                error has ``peer_at_fault`` if the worker caused it.
        """
        ...

    def release(self) -> None:
        """Release the lease.

        Raises:
            BackendError: The lease had ended before, so the bytes that were read under it cannot be trusted.
        """
        ...

    def close(self) -> None:
        """Close the connection and end the lease. May be called more than once. Afterwards no read writes to memory."""
        ...


@runtime_checkable
class Transport(Protocol):
    """Moves tensors between the memory of workers. Thread-safe."""

    def serve(self, table: TensorTable) -> ServedTensors:
        """Make ``table`` readable for peers.

        Raises:
            BackendError: The memory cannot be made readable.
        """
        ...

    def connect(self, peer: Peer) -> PeerSession:
        """Connect to the worker that the URI of the transport names.

        Args:
            peer: The worker, and the weights that it should hold. An empty ``worker_id`` accepts any worker.

        Raises:
            NotFoundError: The worker holds another source, or is another worker.
            BackendError: The worker cannot be reached.
        """
        ...

    def close(self) -> None:
        """Close the transport's own resources. Sessions and served tensors are closed separately."""
        ...
