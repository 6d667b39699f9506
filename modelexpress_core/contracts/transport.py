"""What core asks of a transport: to make the tensors of a worker readable, and to read those of another.

A reader compares, leases, reads and releases, in this order. A draft: transports to other processes may change it.
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
    """One tensor, without its content.

    Attributes:
        name: Name of the tensor.
        shape: Elements along each dimension.
        stride: Elements from one index to the next, along each dimension.
        dtype: Of the elements: ``"bfloat16"``.
        same_memory_as: The first name, in order, of the tensors that begin at the same byte; empty for that one itself.
    """

    name: str
    shape: tuple[int, ...] = field(converter=_integers)
    stride: tuple[int, ...] = field(converter=_integers)
    dtype: str
    same_memory_as: str = ""

    def __attrs_post_init__(self) -> None:
        if len(self.shape) != len(self.stride):
            message = f"{self.name} has {len(self.shape)} dimensions, and {len(self.stride)} strides"
            raise ValueError(message)

    @property
    def canonical(self) -> tuple[str, tuple[int, ...], tuple[int, ...], str, str]:
        """The layout with a stride of 0 in each dimension whose stride has no effect: layouts compare equal by it."""
        empty = 0 in self.shape
        stride = tuple(0 if size <= 1 or empty else step for size, step in zip(self.shape, self.stride, strict=True))
        return self.name, self.shape, stride, self.dtype, self.same_memory_as


@frozen
class TensorTable:
    """The tensors that a worker makes readable.

    Attributes:
        source_id: The ``mx_source_id`` of their identity.
        worker_id: The worker that holds them.
        tensors: Parameters and buffers by name, on the device where they stay.
    """

    source_id: str
    worker_id: str
    tensors: Mapping[str, torch.Tensor] = field(repr=False)


@frozen
class TensorRead:
    """One tensor to read.

    Attributes:
        name: Its name at the peer.
        destination: A tensor of the same layout, whose memory is written.
    """

    name: str
    destination: torch.Tensor = field(repr=False)


@frozen
class Completion:
    """One read that has ended well.

    Attributes:
        name: Name of the tensor, every byte of which is in place.
        bytes: Bytes that were moved for it.
    """

    name: str
    bytes: int


class ServedTensors(Protocol):
    """Tensors that peers may read, until ``close``.

    Attributes:
        endpoint: Where peers connect to: the authority of the worker's URI.
        topology: What the worker's record says about this transport, by key.
    """

    endpoint: str
    topology: Mapping[str, str]

    def drain(self, timeout_seconds: float) -> bool:
        """Grant no more leases, and wait for those that are held; whether all were released in time."""
        ...

    def close(self) -> None:
        """Serve no more: afterwards no peer reads this memory."""
        ...


class PeerSession(Protocol):
    """The connection of one reader to one worker.

    Attributes:
        layouts: Layouts of the tensors that the worker holds, which the reader compares with its own.
    """

    layouts: Sequence[TensorLayout]

    def lease(self) -> None:
        """Have the worker keep its memory as it is until ``release`` or ``close``.

        Raises:
            UnavailableError: The worker is about to change its memory.
            BackendError: Any other failure.
        """
        ...

    def read(self, reads: Sequence[TensorRead]) -> Iterator[Completion]:
        """Read tensors straight into their destinations; each is yielded once, in any order, when it is in place.

        Raises:
            BackendError: While it is iterated; destinations that were not yielded are undefined then. An error that is
                the worker's own has ``peer_at_fault``.
        """
        ...

    def release(self) -> None:
        """Give the lease back.

        Raises:
            BackendError: The lease had ended before: what was read under it cannot be trusted.
        """
        ...

    def close(self) -> None:
        """End the connection, and the lease with it; called once or more often. No read writes to memory afterwards."""
        ...


@runtime_checkable
class Transport(Protocol):
    """Moves tensors between the memory of workers. Thread-safe."""

    def serve(self, table: TensorTable) -> ServedTensors:
        """Make ``table`` readable for peers.

        Raises:
            BackendError: That is not possible.
        """
        ...

    def connect(self, peer: Peer) -> PeerSession:
        """Connect to the worker that the URI of the transport names.

        Args:
            peer: What it is expected to hold. An empty ``worker_id`` takes any worker.

        Raises:
            NotFoundError: The worker holds another source, or is another worker.
            BackendError: It cannot be reached.
        """
        ...

    def close(self) -> None:
        """Give up what the transport holds open; sessions and served tensors are closed by themselves."""
        ...
