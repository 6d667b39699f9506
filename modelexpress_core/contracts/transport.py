"""What every transport does: it makes the tensors of a worker readable, and moves their bytes to another worker.

Core does everything else, over the gRPC service of each worker: it compares the layouts of both sides, takes and renews
the lease that keeps the memory unchanged, proves that the worker is alive, splits tensors into chunks, verifies the
digest of each chunk at its destination, and turns to the next place if one fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from attrs import field, frozen

from modelexpress_core.contracts.candidates import Peer

if TYPE_CHECKING:
    import torch


__all__ = [
    "ChannelSession",
    "PeerAccess",
    "PeerSession",
    "ServedTensors",
    "TensorLayout",
    "TensorRead",
    "TensorTable",
    "Transport",
]


def _ignore(_lease_id: str, _nbytes: int) -> None:
    """Count nothing."""


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
        same_memory_as: Name of the first tensor of the same bytes of memory, if it is another one; else empty.
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
    """The tensors that a worker makes readable, as bytes.

    Attributes:
        source_id: The ``mx_source_id`` of the tensors' identity.
        worker_id: The worker that holds them.
        tensors: The memory of each tensor by name: one dimension of uint8, on its device. Tensors of the same bytes as
            another one, and those without elements, are left out. Others may overlap.
        holds_lease: Whether a reader holds the lease with this id, so that the memory is unchanged. A transport whose
            own code sends the bytes asks it before each piece.
        device: Number of the worker's device, which is added to the port of a transport that has its own.
        count_sent: A transport whose own code sends the bytes calls it with the lease and the number of bytes of each
            piece, when it has sent them.
    """

    source_id: str
    worker_id: str
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    holds_lease: Callable[[str], bool] = field(repr=False)
    device: int = 0
    count_sent: Callable[[str, int], None] = field(default=_ignore, repr=False)


@frozen
class PeerAccess:
    """What core learned of a worker before it connects to it.

    Attributes:
        peer: The worker.
        lease_id: The lease that keeps its memory unchanged; a secret of this reader.
        description: ``ServedTensors.description`` of the worker's side.
        digests_compared: Whether core compares the digest of each chunk where it arrived; a transport then needs no
            checksums of its own.
    """

    peer: Peer
    lease_id: str = field(repr=False)
    description: bytes = field(default=b"", repr=False)
    digests_compared: bool = False


@frozen
class TensorRead:
    """A range of the bytes of one tensor.

    Attributes:
        name: Name of the tensor.
        offset: First byte.
        destination: Where its bytes go: one dimension of uint8, of the length of the range, on the reader's device.
        landed: A session may call it, in the thread that reads, with the number of its first bytes that are in host
            memory and are not written again. Core then digests them while the CPU's caches have them.
    """

    name: str
    offset: int
    destination: torch.Tensor = field(repr=False)
    landed: Callable[[int], None] | None = field(default=None, repr=False, eq=False)


class ServedTensors(Protocol):
    """Tensors that peers may read, until ``close``.

    Attributes:
        description: What ``connect`` of the other side needs; at most 16 MiB. Readers get it under a lease alone.
        topology: Entries that the worker publishes about this transport.
        services: gRPC services that the worker's server offers for this transport, and what implements them, as
            ``wire.rpc.handler`` takes both; mostly empty. Their methods are open to callers without a token or grant:
            each must ask ``TensorTable.holds_lease``.
    """

    description: bytes
    topology: Mapping[str, str]
    services: Mapping[Any, object]

    def close(self) -> None:
        """Stop serving. May be called more than once.

        It returns when no send uses the memory any more. Afterwards no peer reads it: reads under way end with an
        error.
        """
        ...


class PeerSession(Protocol):
    """The connection of one reader to one worker. ``read`` may be called by several threads at once."""

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        """Read ranges straight into their destinations.

        Yields:
            The position of each range in ``reads``, once, in any order, when all its bytes are in place.

        Raises:
            BackendError: During iteration. What the destinations of the ranges that were not yielded hold is undefined
                then. The error has ``peer_at_fault`` if the worker caused it.
        """
        ...

    def close(self) -> None:
        """Close the connection, which ends reads in other threads. May be called more than once.

        Afterwards nothing writes to a destination. A transport that cannot promise that for a read that has begun
        raises ``BackendError``: the memory is then not used again.
        """
        ...


@runtime_checkable
class ChannelSession(PeerSession, Protocol):
    """A session whose transport has several ways for the bytes. Optional.

    Attributes:
        channel: The way of this session, and why it is not a better one, for the log and the report.
    """

    channel: str


@runtime_checkable
class Transport(Protocol):
    """Moves tensors between the memory of workers. Thread-safe."""

    def serve(self, table: TensorTable) -> ServedTensors:
        """Make ``table`` readable for peers.

        Raises:
            BackendError: The memory cannot be made readable.
        """
        ...

    def connect(self, access: PeerAccess) -> PeerSession:
        """Connect to the worker that the URI of the transport names.

        Raises:
            BackendError: The worker cannot be reached in this way.
        """
        ...

    def close(self) -> None:
        """Close the transport's own resources. Sessions and served tensors are closed separately."""
        ...
