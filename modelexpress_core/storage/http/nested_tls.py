"""TLS inside TLS: to a server behind a proxy that is itself spoken to over TLS. Python's sockets cannot do that."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from typing import TypeVar, cast

__all__ = ["NestedTls"]

_R = TypeVar("_R")

_PIECE_BYTES = 64 << 10


class NestedTls:
    """An encrypted connection through ``socket``, with the methods of a socket that connections use.

    Args:
        sock: The encrypted connection to the proxy, with its tunnel open.
        context: Whom to trust.
        host: The server, whose certificate has to be for this name.

    Attributes:
        socket: The connection to the proxy.
    """

    def __init__(self, sock: ssl.SSLSocket, context: ssl.SSLContext, host: str) -> None:
        self.socket = sock
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._to_send, server_hostname=host)

    def do_handshake(self) -> None:
        """Begin TLS with the server."""
        self._exchange(self._tls.do_handshake)

    def recv_into(self, buffer: memoryview, nbytes: int, flags: int = 0, /) -> int:  # noqa: ARG002 - as of a socket
        """As of a socket."""
        try:
            return cast("int", self._exchange(lambda: self._tls.read(nbytes, buffer)))
        except ssl.SSLZeroReturnError:
            return 0

    def sendall(self, data: bytes | memoryview) -> None:
        """As of a socket."""
        view = memoryview(data)
        while view:
            view = view[self._exchange(lambda view=view: self._tls.write(view)) :]  # type: ignore[misc]

    def pending(self) -> int:
        """Bytes that were received and not read."""
        return self._tls.pending() + self._received.pending

    def settimeout(self, seconds: float) -> None:
        """As of a socket."""
        self.socket.settimeout(seconds)

    def fileno(self) -> int:
        """As of a socket."""
        return self.socket.fileno()

    def close(self) -> None:
        """As of a socket."""
        self.socket.close()

    def _exchange(self, step: Callable[[], _R]) -> _R:
        """The outcome of ``step``, for which bytes go back and forth between the two layers.

        The time-out of the socket limits the whole step too, as in Python's own TLS sockets: byte after byte would
        never exceed the wait for the next one.
        """
        seconds = self.socket.gettimeout()
        begun = time.monotonic()
        while True:
            try:
                outcome = step()
            except ssl.SSLWantReadError:
                if seconds is not None and time.monotonic() - begun > seconds:
                    raise TimeoutError("timed out") from None
                self._send_pending()
                piece = self.socket.recv(_PIECE_BYTES)
                if piece:
                    self._received.write(piece)
                else:
                    self._received.write_eof()
            else:
                self._send_pending()
                return outcome

    def _send_pending(self) -> None:
        if self._to_send.pending:
            self.socket.sendall(self._to_send.read())
