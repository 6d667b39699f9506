"""``inproc://``: copies tensors within this process; for tests and notebooks, and a simple example."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modelexpress_core.contracts.transport import PeerAccess, TensorRead, TensorTable
from modelexpress_core.errors import NotFoundError, UnavailableError
from modelexpress_core.uri import ModelURI

__all__ = ["InprocServed", "InprocSession", "InprocTransport", "open_inproc"]

_PROVIDER = "modelexpress-core"

#: Served tensors by their description, which nobody guesses.
_served: dict[bytes, InprocServed] = {}
_lock = threading.Lock()


class InprocServed:
    """Tensors of one worker in this process, readable until ``close``.

    Args:
        table: The tensors.

    Attributes:
        table: The tensors.
        description: The name under which sessions find them.
        topology: Empty.
        services: Empty.
    """

    topology: Mapping[str, str] = {}
    services: Mapping[Any, object] = {}

    def __init__(self, table: TensorTable) -> None:
        self.table = table
        self.description = secrets.token_bytes(16)
        self._copying = threading.Condition()
        self._copies = 0
        self._closed = False

    def copy(self, read: TensorRead, lease_id: str) -> bool:
        """Copy one range; return False if the lease has ended."""
        with self._copying:
            if self._closed or not self.table.holds_lease(lease_id):
                return False
            self._copies += 1
        try:
            length = len(read.destination)
            read.destination.copy_(self.table.tensors[read.name][read.offset : read.offset + length])
            self.table.count_sent(lease_id, length)
        finally:
            with self._copying:
                self._copies -= 1
                self._copying.notify_all()
        return True

    def close(self) -> None:
        """Stop serving, when the copies under way have ended."""
        with _lock:
            _served.pop(self.description, None)
        with self._copying:
            self._closed = True
            self._copying.wait_for(lambda: not self._copies)


class InprocSession:
    """A session that reads one worker's tensors.

    Args:
        served: The worker's tensors.
        lease_id: The lease of this reader.
        uri: Redacted URI of the worker, for messages.
    """

    def __init__(self, served: InprocServed, lease_id: str, uri: str) -> None:
        self._served = served
        self._lease_id = lease_id
        self._uri = uri
        self._lock = threading.Lock()
        self._closed = False

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        """Copy one range after the other."""
        for position, read in enumerate(reads):
            self._check_range(read)
            with self._lock:
                copied = not self._closed and self._served.copy(read, self._lease_id)
            if not copied:
                reason = "the session was closed" if self._closed else "the lease has ended"
                raise UnavailableError(
                    reason,
                    uri=self._uri,
                    operation=f"read {read.name}",
                    provider=_PROVIDER,
                    retryable=False,
                    peer_at_fault=not self._closed,
                )
            yield position

    def _check_range(self, read: TensorRead) -> None:
        memory = self._served.table.tensors.get(read.name)
        end = read.offset + len(read.destination)
        if memory is None or end > len(memory):
            reason = f"there is no tensor {read.name[:200]!r} with bytes {read.offset} to {end - 1}"
            raise NotFoundError(reason, uri=self._uri, operation="read the tensors", provider=_PROVIDER)

    def close(self) -> None:
        """End reads, when the copies under way have ended."""
        with self._lock:
            self._closed = True


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
            _served[served.description] = served
        return served

    def connect(self, access: PeerAccess) -> InprocSession:
        """Find the tensors of the worker."""
        with _lock:
            served = _served.get(access.description)
        if served is None:
            reason = "the worker is not in this process"
            raise NotFoundError(reason, uri=str(self._uri), operation="connect", provider=_PROVIDER)
        return InprocSession(served, access.lease_id, str(self._uri))

    def close(self) -> None:
        """Do nothing: nothing is open."""


def open_inproc(uri: ModelURI, settings: Mapping[str, str]) -> InprocTransport:  # noqa: ARG001 - the factory's signature
    """Open the transport for ``inproc`` URIs."""
    return InprocTransport(uri)
