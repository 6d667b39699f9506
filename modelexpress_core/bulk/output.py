"""The answer to a request of the bulk channel, as it is sent: its head, bytes from memory and files, and checksums."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Protocol

from modelexpress_core.bulk.requests import RefusedError, Run
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.storage.http.connections import Connection

__all__ = ["CHECKSUM_BYTES", "PIECE_BYTES", "PRESENT_BYTES", "Output"]

#: Header of answers to requests for bytes which are still arriving: how many bytes have arrived.
PRESENT_BYTES = "mx-present-bytes"

#: Bytes that are sent at once. Before each piece the lease is looked at; each has a checksum, if there are any.
PIECE_BYTES = 4 << 20

CHECKSUM_BYTES = 8

#: How long the sending of a piece may take.
_SEND_SECONDS = 60.0

#: How long bytes that are not there yet are waited for, and how often the connection is looked at meanwhile.
_WAIT_SECONDS = 20.0
_LOOK_SECONDS = 0.5

_RETRY_AFTER_SECONDS = 1

#: Memory for bytes that pass through this program.
_BUFFER_BYTES = 256 << 10


class _Content(Protocol):
    def send(self, output: Output, run: Run) -> None: ...


class Output:
    """The answer to one request. It belongs to the thread of its connection.

    The head is sent with the first bytes: until then, the request can still be refused.

    Args:
        connection: Where it goes.
        head: The head of the answer.
        checksums: Whether each piece is followed by its CRC-64/NVME.
        is_ended: Whether the lease or the server has ended: the bytes may change, and no more of them are sent.
        count_sent: Called with the number of bytes that were sent.
    """

    def __init__(
        self,
        connection: Connection,
        head: bytes,
        *,
        checksums: bool,
        is_ended: Callable[[], bool],
        count_sent: Callable[[int], None],
    ) -> None:
        self._connection = connection
        self._head = head
        self._checksums = checksums
        self._is_ended = is_ended
        self._count_sent = count_sent
        self._left = self._in_piece = self._crc = 0
        self._buffer: memoryview | None = None
        connection.wait_at_most(_SEND_SECONDS)

    def send(self, content: _Content, run: Run) -> None:
        """Send the bytes of one run."""
        self._left, self._in_piece, self._crc = run.nbytes, 0, 0
        content.send(self, run)
        if self._left:
            message = "the bytes ended before those that were asked for"
            raise ConnectionAbortedError(message)

    def finish(self) -> None:
        """Send the head, if there was nothing else to send."""
        if self._head:
            self._connection.send_all(self._head)
            self._head = b""

    # -- called by contents --------------------------------------------------------------------------------------------

    @property
    def buffer(self) -> memoryview:
        """Memory for bytes that are given to ``write``; the same one for the whole answer."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        return self._buffer

    @property
    def sends_files(self) -> bool:
        """Whether ``write_file`` can be called: nothing on the way needs the bytes in memory."""
        return not self._checksums and self._connection.sends_files

    def wait(self, arrived: Callable[[float], bool], present_bytes: Callable[[], int]) -> None:
        """Wait until bytes are there.

        Args:
            arrived: Waits for them for some seconds, and returns whether they are there.
            present_bytes: How many bytes have arrived so far, also of others; for the reader, if they do not come.

        Raises:
            RefusedError: They did not come in time, or cannot come, and nothing has been sent.
            OSError: Likewise, and the answer has begun; or the connection ended meanwhile.
        """
        deadline = time.monotonic() + _WAIT_SECONDS
        try:
            while not arrived(max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic()))):
                self._check()
                if self._connection.is_ended():
                    message = "the reader ended the connection"
                    raise ConnectionAbortedError(message)
                if time.monotonic() >= deadline:
                    headers = {PRESENT_BYTES: str(present_bytes()), "Retry-After": str(_RETRY_AFTER_SECONDS)}
                    raise self._refusal(
                        HTTPStatus.SERVICE_UNAVAILABLE, "the bytes have not arrived yet", headers=headers
                    )
        except ModelExpressError as exc:
            raise self._refusal(HTTPStatus.BAD_GATEWAY, f"the bytes cannot arrive: {exc.headline}") from exc

    def _refusal(self, status: HTTPStatus, reason: str, *, headers: Mapping[str, str] | None = None) -> Exception:
        return RefusedError(status, reason, headers=headers) if self._head else ConnectionAbortedError(reason)

    def write(self, content: memoryview) -> None:
        """Send the next bytes of the run."""
        while content:
            part = content[: min(len(content), PIECE_BYTES - self._in_piece)]
            content = content[len(part) :]
            self._check()
            ending = self._ending(part)
            self._connection.send_gathered([self._head, part, *ending], _SEND_SECONDS)
            self._sent(len(part))

    def write_file(self, descriptor: int, offset: int, count: int) -> None:
        """Send the next bytes of the run from an open file, at most ``PIECE_BYTES`` of them."""
        self._check()
        self.finish()
        try:
            self._connection.send_file(descriptor, offset, count, _SEND_SECONDS)
        except EOFError as exc:
            raise ConnectionAbortedError(*exc.args) from exc
        self._left -= count
        self._sent(count)

    def _ending(self, part: memoryview) -> list[bytes]:
        """The checksum of the piece that ends with ``part``, if one ends there."""
        self._left -= len(part)
        self._in_piece += len(part)
        ended = self._in_piece == PIECE_BYTES or not self._left
        if self._checksums:
            self._crc = _checksum(part, self._crc)
        ending = [self._crc.to_bytes(CHECKSUM_BYTES, "big")] if ended and self._checksums else []
        if ended:
            self._in_piece = self._crc = 0
        return ending

    def _sent(self, nbytes: int) -> None:
        self._head = b""
        self._count_sent(nbytes)

    def _check(self) -> None:
        if self._is_ended():
            message = "the lease ended while its bytes were sent"
            raise ConnectionAbortedError(message)


def _checksum(content: memoryview, before: int) -> int:
    from awscrt import checksums

    return int(checksums.crc64nvme(content, before))
