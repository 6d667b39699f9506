"""Servers in the place of Azure, and of what gives tokens, that dawdle or never end: errors within bounds."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from modelexpress_core.errors import AccessDeniedError, BackendError, DeadlineError, UnavailableError
from modelexpress_core.uri import ModelURI
from mx_azure._storage import AzureStorage, open_azure
from tests.support.http_servers import answering

#: How long the storage waits, and what an operation may take in the end, on a slow machine.
_READ_TIMEOUT_SECONDS = "0.3"
_LIMIT_SECONDS = 15.0
_ATTACK_SECONDS = 40.0
_LIMIT_BYTES = 96 << 20

Operation = Callable[[AzureStorage], Any]

_OPERATIONS: dict[str, Operation] = {
    "list": lambda storage: list(storage.list("model")),
    "stat": lambda storage: storage.stat("model/a"),
    "read": lambda storage: storage.read_into("model/a", 0, memoryview(bytearray(1000)), version='"v"'),
}
_EACH = pytest.mark.parametrize("operation", _OPERATIONS.values(), ids=_OPERATIONS)


def _sends(start: bytes, piece: bytes, pause_seconds: float = 0.0) -> Callable[[socket.socket, bytes], None]:
    """Sends ``start``, and then one piece after the other, for as long as the client takes them."""

    def send(sock: socket.socket, _: bytes) -> None:
        sock.sendall(start)
        pause, until = threading.Event(), time.monotonic() + _ATTACK_SECONDS
        while time.monotonic() < until:
            if pause_seconds:
                pause.wait(pause_seconds)
            sock.sendall(piece)

    return send


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """The block takes little time and memory."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - begun < _LIMIT_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < _LIMIT_BYTES


@pytest.fixture
def attacked() -> Iterator[Callable[..., AzureStorage]]:
    """Opens storages on a server that sends one thing after another."""
    with contextlib.ExitStack() as stack:

        def attacked(start: bytes, piece: bytes, pause_seconds: float = 0.0) -> AzureStorage:
            server = stack.enter_context(answering(b"-", piece=_sends(start, piece, pause_seconds)))
            settings = {
                "AZURE_STORAGE_ACCOUNT_NAME": "models1",
                "AZURE_STORAGE_ACCOUNT_KEY": "a2V5",
                "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{server.port}/models1",
                "MX_AZURE_READ_TIMEOUT_SECONDS": _READ_TIMEOUT_SECONDS,
            }
            storage = open_azure(ModelURI.parse("az://models"), settings)
            return stack.enter_context(contextlib.closing(storage))

        yield attacked


@_EACH
@pytest.mark.parametrize(
    ("start", "piece"),
    [(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"), (b"HTTP/1.1 200 OK\r\nETag: ", b"y"), (b"", b"HTTP/1.1 100 C\r\n\r\n")],
    ids=["headers", "header", "interim"],
)
def test_a_head_that_drips(
    attacked: Callable[..., AzureStorage], operation: Operation, start: bytes, piece: bytes
) -> None:
    """Silence in the end, which may be tried again."""
    storage = attacked(start, piece, 0.05)

    with bounded(), pytest.raises(DeadlineError, match="MX_AZURE_READ_TIMEOUT_SECONDS") as caught:
        operation(storage)

    assert caught.value.retryable


@pytest.mark.parametrize("status", [b"200 OK", b"503 Server Busy", b"403 Forbidden"])
def test_a_listing_that_drips(attacked: Callable[..., AzureStorage], status: bytes) -> None:
    """Likewise, also where it is an error."""
    storage = attacked(b"HTTP/1.1 " + status + b"\r\nContent-Length: 1000000\r\n\r\n<?xml", b" ", 0.05)

    with bounded(), pytest.raises(DeadlineError):
        list(storage.list("model"))


@_EACH
@pytest.mark.parametrize("status", [b"403 Forbidden", b"404 Not Found", b"400 Bad Request", b"503 Server Busy"])
def test_an_error_of_four_gigabytes(attacked: Callable[..., AzureStorage], operation: Operation, status: bytes) -> None:
    """Its status counts; of its body, little is read."""
    storage = attacked(b"HTTP/1.1 " + status + b"\r\nContent-Length: 4000000000\r\n\r\n", b"<a>" * 20_000)

    with bounded(), pytest.raises(BackendError, match=status[:3].decode()):
        operation(storage)


def test_a_listing_without_end(attacked: Callable[..., AzureStorage]) -> None:
    """One page of it, as large as none of Azure is."""
    start = b"HTTP/1.1 200 OK\r\nContent-Length: 4000000000\r\n\r\n<EnumerationResults><Blobs>"
    storage = attacked(start, b"<Blob><Name>model/a</Name></Blob>" * 1000)

    with bounded(), pytest.raises(UnavailableError):
        list(storage.list("model"))


@pytest.mark.parametrize(
    ("start", "piece", "pause_seconds"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n", 0.05),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"{", 0.05),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4000000000\r\n\r\n", b"{" * 65536, 0.0),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 4000000000\r\n\r\n", b"{" * 65536, 0.0),
    ],
    ids=["head", "body", "giant", "giant-error"],
)
def test_tokens_from_a_service_that_never_ends(
    start: bytes, piece: bytes, pause_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metadata service is asked over connections with the same bounds."""
    settings = {"AZURE_STORAGE_ACCOUNT_NAME": "models1", "MX_AZURE_READ_TIMEOUT_SECONDS": _READ_TIMEOUT_SECONDS}
    with answering(b"-", piece=_sends(start, piece, pause_seconds)) as server:
        monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", f"http://127.0.0.1:{server.port}")
        with (
            contextlib.closing(open_azure(ModelURI.parse("az://models"), settings)) as storage,
            bounded(),
            pytest.raises(AccessDeniedError),
        ):
            storage.stat("model/a")

        assert 0 < len(server.requests) < 10
