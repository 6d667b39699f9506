"""Servers that dawdle or never end, and the tests that each storage over HTTP passes against them."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from modelexpress_core.errors import AccessDeniedError, BackendError, DeadlineError, UnavailableError
from tests.support.http_servers import answering

__all__ = ["EACH_OPERATION", "OPERATIONS", "READ_TIMEOUT_SECONDS", "HttpAttacks", "bounded", "sends"]

#: How long the storage waits, and what an operation may take in the end, on a slow machine.
READ_TIMEOUT_SECONDS = 0.3
_LIMIT_SECONDS = 15.0
_LIMIT_BYTES = 96 << 20

#: How long the servers go on unless the client goes away.
_ATTACK_SECONDS = 40.0

Attacked = Callable[..., Any]
Operation = Callable[[Any], Any]

OPERATIONS: dict[str, Operation] = {
    "list": lambda storage: list(storage.list("model")),
    "stat": lambda storage: storage.stat("model/a"),
    "read": lambda storage: storage.read_into("model/a", 0, memoryview(bytearray(1000)), version='"v"'),
}
EACH_OPERATION = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)

#: Start of an answer, and the piece that follows it again and again.
_HEADS = {
    "headers": (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
    "header": (b"HTTP/1.1 200 OK\r\nETag: ", b"y"),
    "interim": (b"", b"HTTP/1.1 100 C\r\n\r\n"),
}
_EACH_HEAD = pytest.mark.parametrize(("start", "piece"), _HEADS.values(), ids=_HEADS)

_GIANT = b"\r\nContent-Length: 4000000000\r\n\r\n"


def sends(
    start: bytes, piece: bytes, pause_seconds: float = 0.0, sent: list[int] | None = None
) -> Callable[[socket.socket, bytes], None]:
    """Make a sender for ``answering``: ``start``, and then one piece after the other, as long as the client takes them.

    Args:
        start: What is sent first.
        piece: What is sent again and again.
        pause_seconds: Before each piece.
        sent: Gets the length of each piece that was taken.
    """

    def send(sock: socket.socket, _: bytes) -> None:
        # Without pauses in one piece, so that more than the head is there when the client has read the head.
        sock.sendall(start if pause_seconds else start + piece)
        pause, until = threading.Event(), time.monotonic() + _ATTACK_SECONDS
        while time.monotonic() < until:
            if pause_seconds:
                pause.wait(pause_seconds)
            sock.sendall(piece)
            if sent is not None:
                sent.append(len(piece))

    return send


@contextlib.contextmanager
def bounded(limit_bytes: int = _LIMIT_BYTES) -> Iterator[None]:
    """The block takes little time and memory."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - begun < _LIMIT_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < limit_bytes


class HttpAttacks:
    """What every storage over HTTP withstands: inherit it, and override the fixtures.

    Attributes:
        timeout_variable: What limits the wait for the next bytes.
        listing: Start of a listing, and an entry that is repeated without end.
    """

    timeout_variable: ClassVar[str]
    listing: ClassVar[tuple[bytes, bytes]]

    @pytest.fixture
    def open_at(self) -> Callable[[str], Any]:
        """Opens a storage on the server at a URL, with the read timeout of this module; closed by the fixture."""
        raise NotImplementedError  # abstract: the tests of each package open their own

    @pytest.fixture
    def open_with_credentials_from(self) -> Callable[[str], Any]:
        """Opens a storage whose credentials come from the server at a URL."""
        raise NotImplementedError  # abstract: the tests of each package open their own

    @pytest.fixture
    def attacked(self, open_at: Callable[[str], Any]) -> Iterator[Attacked]:
        """Opens storages on a server that sends one thing after another."""
        with contextlib.ExitStack() as stack:

            def attacked(start: bytes, piece: bytes, pause_seconds: float = 0.0) -> Any:
                server = stack.enter_context(answering(b"-", piece=sends(start, piece, pause_seconds)))
                return open_at(f"http://127.0.0.1:{server.port}")

            yield attacked

    @EACH_OPERATION
    @_EACH_HEAD
    def test_a_head_that_drips(self, attacked: Attacked, operation: Operation, start: bytes, piece: bytes) -> None:
        """Silence in the end, which may be tried again."""
        storage = attacked(start, piece, 0.05)

        with bounded(), pytest.raises(DeadlineError, match=self.timeout_variable) as caught:
            operation(storage)

        assert caught.value.retryable

    @_EACH_HEAD
    def test_a_head_without_end(self, attacked: Attacked, start: bytes, piece: bytes) -> None:
        """It is given up after some KiB."""
        storage = attacked(start, piece)

        with bounded(), pytest.raises(UnavailableError):
            OPERATIONS["stat"](storage)

    @pytest.mark.parametrize("status", [b"200 OK", b"503 Slow Down", b"403 Forbidden"])
    def test_a_listing_that_drips(self, attacked: Attacked, status: bytes) -> None:
        """Likewise, also where it is an error."""
        storage = attacked(b"HTTP/1.1 " + status + b"\r\nContent-Length: 1000000\r\n\r\n", b" ", 0.05)

        with bounded(), pytest.raises(DeadlineError):
            OPERATIONS["list"](storage)

    @EACH_OPERATION
    @pytest.mark.parametrize("status", [b"403 Forbidden", b"404 Not Found", b"400 Bad Request", b"503 Slow Down"])
    def test_an_error_of_four_gigabytes(self, attacked: Attacked, operation: Operation, status: bytes) -> None:
        """Its status counts; of its body, a MiB is read."""
        storage = attacked(b"HTTP/1.1 " + status + _GIANT, b"<a>" * 20_000)

        with bounded(), pytest.raises(BackendError, match=status[:3].decode()):
            operation(storage)

    def test_a_listing_without_end(self, attacked: Attacked) -> None:
        """One page of it, as large as none of the service is."""
        start, entry = self.listing
        storage = attacked(b"HTTP/1.1 200 OK" + _GIANT + start, entry * 1000)

        with bounded(), pytest.raises(UnavailableError):
            OPERATIONS["list"](storage)

    def test_chunks_with_extensions_without_end(self, attacked: Attacked) -> None:
        """They are no content, and bounded likewise."""
        start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        storage = attacked(start, b"0" * 8 + b";" + b"x" * 8000)

        with bounded(), pytest.raises(UnavailableError):
            OPERATIONS["list"](storage)

    @pytest.mark.parametrize(
        ("start", "piece", "pause_seconds"),
        [
            (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n", 0.05),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"{", 0.05),
            (b"HTTP/1.1 200 OK" + _GIANT, b"{" * 65536, 0.0),
            (b"HTTP/1.1 500 Oops" + _GIANT, b"{" * 65536, 0.0),
        ],
        ids=["head", "body", "giant", "giant-error"],
    )
    def test_credentials_from_a_server_that_never_ends(
        self, open_with_credentials_from: Callable[[str], Any], start: bytes, piece: bytes, pause_seconds: float
    ) -> None:
        """What gives credentials is asked over connections with the same bounds."""
        with answering(b"-", piece=sends(start, piece, pause_seconds)) as server:
            storage = open_with_credentials_from(f"http://127.0.0.1:{server.port}")

            with bounded(), pytest.raises(AccessDeniedError):
                OPERATIONS["stat"](storage)

            assert 0 < len(server.requests) < 10
