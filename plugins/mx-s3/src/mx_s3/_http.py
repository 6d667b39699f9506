"""What botocore does not offer: the sockets below a client, and a body's bytes read straight into memory."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError
from urllib3.exceptions import HTTPError

from modelexpress_core.storage.http import OpenSockets

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["Connections"]

#: The most that is lost where a connection is reset: what http.client read before does not count then.
_PIECE_BYTES = 256 << 10

#: What the kernel fills at once. Nothing of it is lost, and there is time to notice that others gave up.
_STRAIGHT_BYTES = 1 << 20


class _Reading(threading.local):
    """The read that this thread is at."""

    under_way = False
    sock: Any = None
    timeout_seconds = 0.0


class Connections:
    """The sockets of one client, so that one thread can end what others wait for, and waits can be cut short.

    Args:
        read_timeout_seconds: How long the client itself waits for the next bytes.
    """

    def __init__(self, read_timeout_seconds: float) -> None:
        self._sockets = OpenSockets()
        self._reading = _Reading()
        self._read_timeout_seconds = read_timeout_seconds
        self._patience_seconds = read_timeout_seconds

    @property
    def closed(self) -> bool:
        """Reads have been ended, and later ones will fail."""
        return self._sockets.closed

    @property
    def patience_seconds(self) -> float:
        """How long a read waits for its next bytes; never longer than the client does."""
        return self._patience_seconds

    @patience_seconds.setter
    def patience_seconds(self, seconds: float) -> None:
        self._patience_seconds = min(seconds, self._read_timeout_seconds)

    def watch(self, client: S3Client) -> None:
        """Know every socket that ``client`` opens from now on.

        botocore has no public way to them. Should a version of it keep them elsewhere, reads still end after
        ``close``, but only with what they wait for, or with its timeout; and silent ones with its timeout.
        """
        endpoint: Any = getattr(client, "_endpoint", None)
        pools = getattr(getattr(endpoint, "http_session", None), "_pool_classes_by_scheme", {})
        for scheme, pool in pools.items():
            methods = {"connect": self._connect(pool), "getresponse": self._getresponse(pool)}
            watched = type(pool.ConnectionCls.__name__, (pool.ConnectionCls,), methods)
            pools[scheme] = type(pool.__name__, (pool,), {"ConnectionCls": watched})

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it, requests of this thread wait no longer than ``patience_seconds``."""
        self._reading.under_way = True
        try:
            yield
        finally:
            self._reading.under_way, self._reading.sock = False, None

    def read_body(self, body: Any, view: memoryview) -> tuple[int, Exception | None]:  # noqa: ANN401 - one of two
        """Fill ``view`` with the next bytes of ``body``, and give up its connection: for reuse if it is at its end.

        Args:
            body: What is read: a response of urllib3, or the body that botocore makes of one.
            view: Where to.

        Returns:
            Number of bytes that arrived, and what kept more from arriving (None where the stream just ended).
        """
        response: Any = getattr(body, "_raw_stream", body)
        message: Any = getattr(response, "_fp", None)
        sock = self._reading.sock
        straight = _Straight(sock, message, self._patience_seconds) if _Straight.can_read(sock, message) else None
        # urllib3's own readinto goes through a copy; that of http.client, below it, does not.
        readinto = getattr(message, "readinto", None) or _copying(body)
        piece_bytes = _PIECE_BYTES
        if straight is not None:
            readinto, piece_bytes = straight.readinto, _STRAIGHT_BYTES
        done, error = 0, None
        try:
            while done < len(view):
                if straight is None:
                    self._wait_patiently()
                count = readinto(view[done : done + piece_bytes])
                if not count:
                    break
                done += count
        except (OSError, HTTPException, HTTPError, BotoCoreError) as exc:
            error = exc
        finally:
            if straight is not None:
                straight.end()
            if done < len(view) or not getattr(response, "closed", False):
                body.close()
            if hasattr(response, "release_conn"):
                response.release_conn()
        return done, error

    def _wait_patiently(self) -> None:
        reading, seconds = self._reading, self._patience_seconds
        if reading.sock is not None and reading.timeout_seconds != seconds:
            reading.timeout_seconds = seconds
            with suppress(OSError):  # closed: the read finds that out
                reading.sock.settimeout(seconds)

    def _getresponse(self, pool: Any) -> Callable[..., Any]:  # noqa: ANN401 - a class of urllib3's pools
        original = pool.ConnectionCls.getresponse

        def getresponse(connection: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of that pool
            if self._reading.under_way and connection.sock is not None:
                self._reading.sock, self._reading.timeout_seconds = connection.sock, self._patience_seconds
                connection.sock.settimeout(self._patience_seconds)
                connection.timeout = self._patience_seconds  # urllib3 2 sets the socket's timeout to this once more
            return original(connection, *args, **kwargs)

        return getresponse

    def _connect(self, pool: Any) -> Callable[[Any], None]:  # noqa: ANN401 - a class of urllib3's pools
        original = pool.ConnectionCls.connect

        def connect(connection: Any) -> None:  # noqa: ANN401 - of that pool
            original(connection)
            try:
                self._sockets.add(connection.sock)
            except ConnectionAbortedError:
                connection.close()
                raise

        return connect

    def shut_down(self) -> None:
        """End every read that waits for bytes, and every one that comes later."""
        self._sockets.shut_down()


def _copying(body: Any) -> Callable[[memoryview], int]:  # noqa: ANN401 - as read_body
    """What fills memory from ``body`` by its public methods alone."""

    def readinto(view: memoryview) -> int:
        piece = body.read(len(view))
        view[: len(piece)] = piece
        return len(piece)

    return readinto


class _Straight:
    """Fills memory from a plain socket, the kernel waiting until a piece is complete: a tenth of the calls.

    Python's own timeouts make a socket return whatever has arrived; here the kernel has the timeout. It counts for a
    call, and a call that brought anything ends without an error, so that silence is noticed after twice that time at
    most.

    Args:
        sock: The socket.
        message: The answer of http.client whose content is read from it.
        timeout_seconds: How long a call waits.
    """

    def __init__(self, sock: socket.socket, message: HTTPResponse, timeout_seconds: float) -> None:
        self._sock = sock
        self._message = message
        self._timeout_seconds = timeout_seconds
        self._buffered: int | None = None
        self._blocking = False

    @staticmethod
    def can_read(sock: Any, message: Any) -> bool:  # noqa: ANN401 - what this finds out
        """Whether the socket is a plain one, of a system of which is known how timeouts are set, and ends are told."""
        plain = type(sock) is socket.socket and sys.platform == "linux" and sys.maxsize > 2**32
        return plain and isinstance(message, HTTPResponse) and bool(message.length) and not message.chunked

    def readinto(self, view: memoryview) -> int:
        message = self._message
        if self._buffered is None:
            self._buffered = len(message.fp.peek(1))
        if self._buffered:  # came with the head
            count = message.readinto(view[: self._buffered])
            self._buffered -= count
            return count
        if not self._blocking:
            self._sock.setblocking(True)
            self._blocking = True
            seconds, rest = divmod(self._timeout_seconds, 1)
            timeout = struct.pack("@ll", int(seconds), int(rest * 1e6))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        try:
            count = self._sock.recv_into(view, 0, socket.MSG_WAITALL)
        except BlockingIOError as exc:
            raise TimeoutError("timed out") from exc
        if count:
            message.length = (message.length or 0) - count
        return count

    def end(self) -> None:
        """Leave socket and answer as http.client would."""
        if self._blocking:
            with suppress(OSError):  # closed
                self._sock.settimeout(self._timeout_seconds)
            if not self._message.length:
                self._message.close()
