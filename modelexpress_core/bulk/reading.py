"""The reader's end of the bulk channel: ranges of bytes, straight into place."""

from __future__ import annotations

import contextlib
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

from attrs import field, frozen

from modelexpress_core.bulk.output import CHECKSUM_BYTES, PIECE_BYTES
from modelexpress_core.bulk.requests import Run, target_of
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    IntegrityError,
    StillArrivingError,
    UnavailableError,
)
from modelexpress_core.messages import printable
from modelexpress_core.storage.http.answers import Answer
from modelexpress_core.storage.http.connections import ConnectionPool
from modelexpress_core.storage.http.requests import Origin, Request

if TYPE_CHECKING:
    import torch

    from modelexpress_core.transport.staging import Staging

__all__ = ["BulkOffer", "BulkRead", "BulkReader"]

_MAX_REASON_BYTES = 1024

#: Bytes that are received at once: what is called with them finds them in the CPU's caches.
_LANDING_BYTES = 1 << 20


@frozen
class BulkOffer:
    """Where a server sends bytes, and the ticket that it gave for them.

    Attributes:
        origin: The server.
        ticket: The ticket; a secret of this reader.
        content: What is read, as in the ticket.
    """

    origin: Origin
    ticket: str = field(repr=False)
    content: str


@frozen
class BulkRead:
    """A range of bytes, and where it goes.

    Attributes:
        run: The range, or the pieces.
        destination: One dimension of uint8, as long as all pieces together: a tensor on any device, or memory.
        landed: Called with the number of its first bytes that are in place, for destinations in host memory.
    """

    run: Run
    destination: torch.Tensor | memoryview = field(repr=False)
    landed: Callable[[int], None] | None = field(default=None, repr=False, eq=False)


class BulkReader:
    """Reads from one server. Thread-safe; each thread that reads has a connection of its own.

    It uses no proxy: bytes go to the server itself, or not at all.

    Args:
        offer: What the server offered.
        connect_timeout_seconds: How long connecting may take.
        patience_seconds: How long a read waits for its next bytes.
        tls_context: Returns the context of each TLS connection; None for the authorities of this system.
        tls_name: The name that the certificate of the server has to have; None for that of the origin.

    Attributes:
        patience_seconds: As above; may be set while reads run.
    """

    def __init__(
        self,
        offer: BulkOffer,
        *,
        connect_timeout_seconds: float,
        patience_seconds: float,
        tls_context: Callable[[], ssl.SSLContext] | None = None,
        tls_name: str | None = None,
    ) -> None:
        self._origin = offer.origin
        self._target = target_of(offer.content)
        self._headers = (("Authorization", f"Bearer {offer.ticket}"), ("Content-Type", "application/json"))
        self.patience_seconds = patience_seconds
        self._changed = threading.Condition()
        self._writes = 0
        self._pool = ConnectionPool(
            connect_timeout_seconds=connect_timeout_seconds, tls_context=tls_context, tls_name=tls_name
        )

    @property
    def closed(self) -> bool:
        """``close`` was called."""
        return self._pool.closed

    def check(self) -> None:
        """Connect, and show the ticket; the connection is kept for the first read.

        Raises:
            BackendError: The server cannot be reached, or refuses the ticket.
        """
        for _ in self.read([]):
            pass

    def read(self, reads: Sequence[BulkRead], *, checksums: bool = False) -> Iterator[int]:
        """Read ranges with one request, each straight into its destination.

        Args:
            reads: The ranges.
            checksums: Whether the server sends checksums, and they are compared.

        Yields:
            The position of each range, in order, when all its bytes are in place.

        Raises:
            StillArrivingError: The server itself does not have the first bytes yet.
            UnavailableError: The connection could not be made, or broke; what was not yielded can be read again.
            IntegrityError: Bytes do not have their checksum.
            BackendError: The server refuses the request.
        """
        runs = [each.run.on_wire for each in reads]
        body = json.dumps({"runs": runs, "checksums": checksums}, separators=(",", ":")).encode()
        length = ("Content-Length", str(len(body)))
        request = Request("POST", self._origin, self._target, (*self._headers, length), body)
        expected = sum(_length_sent(each.run.nbytes, checksums=checksums) for each in reads)
        try:
            with self._pool.send(request, lambda: self.patience_seconds) as answer:
                _check(answer, expected)
                staging: Staging | None = None
                for position, each in enumerate(reads):
                    with self._writing():
                        destination = each.destination
                        if isinstance(destination, memoryview) or destination.device.type == "cpu":
                            _receive_in_place(answer, each, checksums=checksums)
                        else:
                            staging = staging or _staging(destination.device)
                            staging.copy_in(destination, lambda view: _receive(answer, view, checksums=checksums))
                    yield position
        except OSError as exc:
            where = self._origin.host_and_port
            raise UnavailableError(
                f"the bulk channel on {where} cannot be read: {exc.strerror or exc or type(exc).__name__}",
                cause="the other side ended, or a firewall lets only its gRPC port through",
                hint="allow connections to this port",
            ) from exc

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Write to a destination in the ``with`` block, for which ``close`` waits."""
        with self._changed:
            if self._pool.closed:
                message = "the reader was closed"
                raise ConnectionAbortedError(message)
            self._writes += 1
        try:
            yield
        finally:
            with self._changed:
                self._writes -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """End reads in other threads, which raise then. When it returns, nothing writes to a destination any more."""
        self._pool.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._writes)


def _length_sent(length: int, *, checksums: bool) -> int:
    return length + (CHECKSUM_BYTES * -(-length // PIECE_BYTES) if checksums else 0)


def _check(answer: Answer, expected: int) -> None:
    if answer.status != HTTPStatus.OK:
        said = printable(answer.read(_MAX_REASON_BYTES).decode("utf-8", "replace").strip())
        later, present = answer.headers.get("retry-after", ""), answer.headers.get("mx-present-bytes", "")
        if answer.status == HTTPStatus.SERVICE_UNAVAILABLE and re.fullmatch(r"[0-9]{1,3}", later):
            raise StillArrivingError(
                f"the bulk channel has no bytes to send yet: {said}",
                present_bytes=int(present) if re.fullmatch(r"[0-9]{1,19}", present) else 0,
                retry_after_seconds=float(later),
                cause="the server is still downloading the model",
                hint="read again when the download has advanced",
            )
        cls = AccessDeniedError if answer.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN} else BackendError
        raise cls(
            f"the bulk channel answered HTTP {answer.status}: {said}",
            cause="the lease of this reader has ended, or another program listens there",
            hint="start the load again",
        )
    length, encoding = answer.headers.get("content-length"), answer.headers.get("content-encoding")
    if length != str(expected) or encoding is not None:
        reason = f"the bulk channel answered with {length} bytes in the encoding {encoding}, not with {expected} bytes"
        raise BackendError(
            reason, cause="a proxy on the way changes answers", hint="let workers reach each other without a proxy"
        )


def _receive_in_place(answer: Answer, read: BulkRead, *, checksums: bool) -> None:
    memory = read.destination if isinstance(read.destination, memoryview) else _memory_of(read.destination)
    step = PIECE_BYTES if checksums else _LANDING_BYTES
    for start in range(0, len(memory), step):
        piece = memory[start : start + step]
        _receive(answer, piece, checksums=checksums)
        if read.landed is not None:
            read.landed(start + len(piece))


def _memory_of(tensor: torch.Tensor) -> memoryview:
    from modelexpress_core.transport.tensor_bytes import host_memory

    return host_memory(tensor)


def _receive(answer: Answer, view: memoryview, *, checksums: bool) -> None:
    """Fill ``view`` with the next piece."""
    _fill(answer, view)
    if not checksums:
        return
    from awscrt import checksums as crc

    sent = bytearray(CHECKSUM_BYTES)
    _fill(answer, memoryview(sent))
    if int.from_bytes(sent, "big") != crc.crc64nvme(view, 0):
        raise IntegrityError(
            f"{len(view)} bytes arrived with another checksum: bits changed on the way",
            cause="a proxy, a network or a memory on the way changed bytes",
            hint="use TLS, which notices it",
        )


def _fill(answer: Answer, view: memoryview) -> None:
    if answer.read_into(view) != len(view):
        message = "the connection was closed amid the answer"
        raise ConnectionError(message)


def _staging(device: torch.device) -> Staging:
    from modelexpress_core.transport.staging import Staging

    return Staging(device, piece_bytes=PIECE_BYTES)
