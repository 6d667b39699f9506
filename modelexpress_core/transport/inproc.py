"""``inproc://``: reads tensors of another model in this process; for tests and notebooks, and a simple example."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from modelexpress_core.contracts.candidates import Peer
from modelexpress_core.contracts.transport import Completion, TensorLayout, TensorRead, TensorTable
from modelexpress_core.errors import NotFoundError, UnavailableError
from modelexpress_core.transport.layouts import tensor_layouts
from modelexpress_core.uri import ModelURI

__all__ = ["InprocServed", "InprocSession", "InprocTransport", "open_inproc"]

_PROVIDER = "modelexpress-core"

_numbers = itertools.count(1)
_served: dict[str, InprocServed] = {}
_lock = threading.Lock()


class InprocServed:
    """Tensors of one worker in this process, readable until ``close``.

    Args:
        table: The tensors.

    Attributes:
        endpoint: The authority of the worker's URIs.
        topology: Empty.
    """

    topology: Mapping[str, str] = {}

    def __init__(self, table: TensorTable) -> None:
        self.table = table
        self.layouts: Sequence[TensorLayout] = tensor_layouts(table.tensors)
        self.endpoint = f"worker-{next(_numbers)}"
        self._changed = threading.Condition()
        self._leases: set[int] = set()
        self._draining = False

    def grant(self, lease: int) -> bool:
        """Keep the memory unchanged for ``lease``; return False while draining."""
        with self._changed:
            if not self._draining:
                self._leases.add(lease)
            return not self._draining

    def release(self, lease: int) -> bool:
        """End ``lease``; return False if it had ended before."""
        with self._changed:
            held = lease in self._leases
            self._leases.discard(lease)
            self._changed.notify_all()
            return held

    def drain(self, timeout_seconds: float) -> bool:
        """Grant no more leases and wait for the active ones; return whether all were released in time.

        The others end.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._draining = True
            while self._leases:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._leases.clear()
                    return False
                self._changed.wait(left)
            return True

    def close(self) -> None:
        """Stop serving, and end every lease."""
        with _lock:
            _served.pop(self.endpoint, None)
        self.drain(0)


class InprocSession:
    """A session that reads one worker's tensors.

    Args:
        served: The worker's tensors.
        uri: Redacted URI of the worker, for messages.

    Attributes:
        layouts: Layouts of the worker's tensors.
    """

    def __init__(self, served: InprocServed, uri: str) -> None:
        self.layouts = served.layouts
        self._served = served
        self._uri = uri
        self._lease = next(_numbers)

    def lease(self) -> None:
        """Ask the worker to keep its memory unchanged."""
        if not self._served.grant(self._lease):
            reason = "the worker is about to change its memory"
            raise UnavailableError(
                reason, uri=self._uri, operation="lease the tensors", provider=_PROVIDER, retryable=False
            )

    def read(self, reads: Sequence[TensorRead]) -> Iterator[Completion]:
        """Copy one tensor after the other."""
        import torch

        tensors = self._served.table.tensors
        for read in reads:
            source = tensors[read.name]
            with torch.no_grad():
                read.destination.copy_(source)
            yield Completion(read.name, source.nbytes)

    def release(self) -> None:
        """Release the lease; raise if it had ended before."""
        if not self._served.release(self._lease):
            reason = "the lease ended before the reads did, so the data cannot be trusted"
            raise UnavailableError(
                reason,
                uri=self._uri,
                operation="release the tensors",
                provider=_PROVIDER,
                retryable=False,
                peer_at_fault=True,
                cause="the worker changed or freed its memory during the reads",
            )

    def close(self) -> None:
        """End the lease, if it is still held."""
        self._served.release(self._lease)


class InprocTransport:
    """Serves and reads tensors within this process.

    Args:
        uri: The worker for ``connect``; for ``serve`` its authority is empty.
    """

    def __init__(self, uri: ModelURI) -> None:
        self._uri = uri

    def serve(self, table: TensorTable) -> InprocServed:
        """Make ``table`` readable in this process."""
        served = InprocServed(table)
        with _lock:
            _served[served.endpoint] = served
        return served

    def connect(self, peer: Peer) -> InprocSession:
        """Find the worker that the URI names."""
        with _lock:
            served = _served.get(self._uri.authority)
        if served is None:
            reason = "no worker in this process has that name"
        elif peer.source_id != served.table.source_id or peer.worker_id not in {"", served.table.worker_id}:
            reason = f"the worker is {served.table.worker_id!r} and holds source {served.table.source_id!r}"
        else:
            return InprocSession(served, str(self._uri))
        raise NotFoundError(reason, uri=str(self._uri), operation="connect", provider=_PROVIDER)

    def close(self) -> None:
        """Do nothing: nothing is open."""


def open_inproc(uri: ModelURI, settings: Mapping[str, str]) -> InprocTransport:  # noqa: ARG001 - the factory's signature
    """Open the transport for ``inproc`` URIs."""
    return InprocTransport(uri)
