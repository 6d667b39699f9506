"""Servers that dawdle or never end: each read ends in the time and the memory that it may take."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from modelexpress_core.errors import BackendError, DeadlineError, UnavailableError
from modelexpress_core.storage.http import (
    ConnectionPool,
    Failures,
    Proxies,
    RangeReader,
    Refusal,
    Request,
    SettingNames,
)
from modelexpress_core.storage.http.connections import Connection
from modelexpress_core.storage.http.nested_tls import NestedTls
from modelexpress_core.uri import ModelURI
from tests.support.http_attacks import sends
from tests.support.http_servers import answering

#: How long a read waits.
_PATIENCE_SECONDS = 0.4
#: What a read may take in the end. The machine may be slow; the attacks would take far longer.
_LIMIT_SECONDS = 5.0

Sender = Callable[[socket.socket, bytes], None]


class _Plain:
    def __init__(self, url: str) -> None:
        self._url = url

    def request(self, path: str, headers: Mapping[str, str]) -> Request:
        return Request.to_url("GET", f"{self._url}/{path}", list(headers.items()))

    def renewed(self, path: str, headers: Mapping[str, str], refusals: Sequence[Refusal]) -> None:
        return None


@contextlib.contextmanager
def reading(send: Sender, *, proxy: bool = False) -> Iterator[RangeReader]:
    """A reader of a server that sends what ``send`` does; or through a proxy that does."""
    with answering(b"-", piece=send) as server:
        url = f"http://127.0.0.1:{server.port}"
        proxies = Proxies.from_environ({"HTTPS_PROXY": url}) if proxy else None
        pool = ConnectionPool(connect_timeout_seconds=_PATIENCE_SECONDS, proxies=proxies)
        failures = Failures(
            "mx-web", ModelURI("web", "host"), endpoint=lambda: url, names=SettingNames(), closed=lambda: pool.closed
        )
        signer = _Plain("https://weights.invalid" if proxy else url)
        with contextlib.closing(pool):
            yield RangeReader(pool, signer, failures, read_timeout_seconds=_PATIENCE_SECONDS)


def drip(start: bytes, piece: bytes = b"x", pause_seconds: float = 0.05) -> Sender:
    """Sends ``start``, and then a piece every now and then."""
    return sends(start, piece, pause_seconds)


def _part(length: int) -> bytes:
    lines = ('ETag: "v"', f"Content-Range: bytes 0-{length - 1}/{length}", f"Content-Length: {length}")
    return "\r\n".join(("HTTP/1.1 206 P", *lines, "", "")).encode()


_CHUNKED = b'HTTP/1.1 206 P\r\nETag: "v"\r\nContent-Range: bytes 0-999999/1000000\r\nTransfer-Encoding: chunked\r\n\r\n'


def read(reader: RangeReader, length: int = 1_000_000) -> int:
    begun = time.monotonic()
    try:
        return reader.read_into("object", 0, memoryview(bytearray(length)), version='"v"')
    finally:
        assert time.monotonic() - begun < _LIMIT_SECONDS


@pytest.mark.parametrize(
    "send",
    [
        drip(b"", b"H"),
        drip(b"HTTP/1.1 206 P\r\n", b"x: y\r\n"),
        drip(b"HTTP/1.1 206 P\r\nx: ", b"y"),
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.3),
        drip(b"HTTP/1.1 102 Processing\r\n\r\n", b"HTTP/1.1 102 Pro", 0.3),
        drip(b"HTTP/1.1 500 Oops\r\nContent-Length: 900000\r\n\r\n"),
        drip(b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drip(b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x"),
        drip(b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n"),
    ],
    ids=["status", "headers", "header", "interim", "interim-slow", "error", "error-chunks", "extension", "trailers"],
)
def test_what_drips_is_a_deadline(send: Sender) -> None:
    """Each byte comes in time, and the answer does not."""
    with reading(send) as reader, pytest.raises(DeadlineError) as caught:
        read(reader)

    assert caught.value.retryable
    assert caught.value.hint


@pytest.mark.parametrize("send", [drip(_part(1_000_000)), drip(_CHUNKED, b"1\r\nx\r\n")], ids=["plain", "chunks"])
def test_a_content_that_drips_gives_a_short_count(send: Sender) -> None:
    """The bytes that arrived count; the rest is asked for anew."""
    with reading(send) as reader:
        assert 0 < read(reader) < 1000


def test_a_slow_content_is_no_attack() -> None:
    """It takes several times the patience, which holds for each wait."""

    def send(sock: socket.socket, _: bytes) -> None:
        sock.sendall(_part(100_000))
        for _ in range(10):
            time.sleep(0.1)
            sock.sendall(bytes(10_000))

    with reading(send) as reader:
        assert 100_000 == read(reader, 100_000)


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"HTTP/1.1 206 P\r\n", b"x: y\r\n" * 1000),
        (b"HTTP/1.1 206 P\r\nx: ", b"y" * 6000),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        (_CHUNKED, b"1;" + b"x" * 8000 + b"\r\nx\r\n"),
        (_CHUNKED + b"0\r\n", b"x: y\r\n" * 1000),
        (b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;" + b"x" * 8000 + b"\r\nx\r\n"),
    ],
    ids=["headers", "header", "interim", "extensions", "trailers", "error-extensions"],
)
def test_what_has_no_end_is_cut(start: bytes, piece: bytes) -> None:
    """After little more than its bound; sockets hold a few MiB."""
    sent: list[int] = []
    with reading(sends(start, piece, sent=sent)) as reader, contextlib.suppress(UnavailableError):
        assert read(reader) < 100  # some bytes of a content may have come

    assert sum(sent) < 16 << 20


def test_an_endless_error_is_cut() -> None:
    """Its status counts, and no more than a MiB of its body is received."""
    sent: list[int] = []
    start = b"HTTP/1.1 500 Oops\r\nContent-Length: 4000000000\r\n\r\n"
    with reading(sends(start, bytes(1 << 16), sent=sent)) as reader, pytest.raises(UnavailableError, match="HTTP 500"):
        read(reader)

    assert sum(sent) < 16 << 20


@pytest.mark.parametrize("length", [b"999999999999999999", b"1000", b"0", b"-5", b"1000000, 999", b"0x10"])
def test_a_length_that_lies(length: bytes) -> None:
    """No more bytes are delivered than there are, and none that are not of the range."""
    content = bytes(range(250)) * 8
    head = b'HTTP/1.1 206 P\r\nETag: "v"\r\nContent-Range: bytes 0-1999/2000\r\nContent-Length: %s\r\n\r\n' % length

    def send(sock: socket.socket, _: bytes) -> None:
        sock.sendall(head + content)
        sock.shutdown(socket.SHUT_RDWR)

    memory = bytearray(4000)
    with reading(send) as reader:
        try:
            done = reader.read_into("object", 0, memoryview(memory), version='"v"')
        except BackendError as exc:
            assert exc.retryable  # noqa: PT017 - one of two outcomes
            done = 0
    assert content[:done] == memory[:done]
    assert bytes(4000 - done) == memory[done:]


def test_a_proxy_that_drips() -> None:
    """The answer to CONNECT has one deadline."""
    with reading(drip(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"), proxy=True) as reader, pytest.raises(BackendError):
        read(reader)


def test_tls_in_tls_that_drips() -> None:
    """A handshake of which a byte comes now and then, and a record that is never complete."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(_PATIENCE_SECONDS)
        nested = NestedTls(ours, ssl.create_default_context(), "weights.invalid")  # type: ignore[arg-type]
        sender = threading.Thread(target=_dripping_record, args=(theirs,), daemon=True)
        sender.start()
        begun = time.monotonic()

        with pytest.raises(TimeoutError):
            nested.do_handshake()

        assert time.monotonic() - begun < _LIMIT_SECONDS
        ours.shutdown(socket.SHUT_RDWR)
        sender.join(_LIMIT_SECONDS)


def _dripping_record(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        drip(b"\x16\x03\x03\x40\x00", b"\x00")(sock, b"")


def test_a_wait_is_never_without_limit() -> None:
    """A limit that is used up is a short wait, not none."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for connection in (Connection(ours),):
            connection.wait_at_most(-1.0)
            with pytest.raises(TimeoutError):
                connection.receive(memoryview(bytearray(1)))
