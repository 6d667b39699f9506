"""Servers in the place of GCS, and of what gives tokens, that dawdle or never end: errors within bounds."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelexpress_core.errors import BackendError
from mx_gcs._storage import GcsStorage
from tests.support.http_servers import answering

#: How long the storage waits, and what an operation may take in the end, on a slow machine.
_READ_TIMEOUT_SECONDS = "0.3"
_LIMIT_SECONDS = 15.0
_ATTACK_SECONDS = 40.0
_LIMIT_BYTES = 96 << 20

_OPERATIONS: dict[str, Callable[[GcsStorage], Any]] = {
    "list": lambda storage: list(storage.list("model")),
    "stat": lambda storage: storage.stat("model/a"),
    "read": lambda storage: storage.read_into("model/a", 0, memoryview(bytearray(1000)), version="1"),
}

_HEAD = b"HTTP/1.1 200 OK\r\nX-Goog-Generation: 1\r\n"
_ATTACKS: dict[str, tuple[bytes, bytes, float]] = {
    "headers without end": (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n", 0.0),
    "a header without end": (b"HTTP/1.1 200 OK\r\nEtag: ", b"y", 0.0),
    "interim answers without end": (b"", b"HTTP/1.1 100 C\r\n\r\n", 0.0),
    "a head byte by byte": (b"HTTP/1.1 200 OK\r\nEtag: ", b"y", 0.1),
    "nothing": (b"", b"", 0.1),
    "chunks with extensions": (_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * 8 + b";" + b"x" * 8000, 0.0),
    "an error without end": (b"HTTP/1.1 500 No\r\n\r\n", b"x" * 65536, 0.0),
    "an error byte by byte": (b"HTTP/1.1 500 No\r\nContent-Length: 1000000\r\n\r\n", b"x", 0.1),
}
#: Reads take the thousand bytes that they want of a content, however long it is.
_CONTENT_ATTACKS: dict[str, tuple[bytes, bytes, float]] = {
    "a content without end": (b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536, 0.0),
    "a content byte by byte": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" ", 0.1),
}


def _sends(start: bytes, piece: bytes, pause_seconds: float) -> Callable[[socket.socket, bytes], None]:
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
def _within_bounds() -> Any:
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - begun < _LIMIT_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < _LIMIT_BYTES


@pytest.mark.parametrize("operation", _OPERATIONS)
@pytest.mark.parametrize("attack", _ATTACKS)
def test_no_answer_of_a_server_holds_up_a_load(attack: str, operation: str, opened: Callable[..., GcsStorage]) -> None:
    """Each ends with an error, in bounds of time and memory."""
    with answering(b"x", piece=_sends(*_ATTACKS[attack])) as server, _within_bounds():
        storage = opened(
            STORAGE_EMULATOR_HOST=f"127.0.0.1:{server.port}", MX_GCS_READ_TIMEOUT_SECONDS=_READ_TIMEOUT_SECONDS
        )
        with pytest.raises(BackendError):
            _OPERATIONS[operation](storage)


@pytest.mark.parametrize("operation", ["list", "stat"])
@pytest.mark.parametrize("attack", _CONTENT_ATTACKS)
def test_no_content_of_a_server_holds_up_a_load(attack: str, operation: str, opened: Callable[..., GcsStorage]) -> None:
    """Each ends with an error, in bounds of time and memory."""
    with answering(b"x", piece=_sends(*_CONTENT_ATTACKS[attack])) as server, _within_bounds():
        storage = opened(
            STORAGE_EMULATOR_HOST=f"127.0.0.1:{server.port}", MX_GCS_READ_TIMEOUT_SECONDS=_READ_TIMEOUT_SECONDS
        )
        with pytest.raises(BackendError):
            _OPERATIONS[operation](storage)


@pytest.mark.parametrize("kind", ["key", "metadata"])
@pytest.mark.parametrize("attack", {**_ATTACKS, **_CONTENT_ATTACKS})
def test_no_answer_with_a_token_holds_up_a_load(
    attack: str, kind: str, opened: Callable[..., GcsStorage], google: Any, tmp_path: Path
) -> None:
    """A service that gives tokens is bounded as GCS is; google-auth's own transports are not."""
    sent = {**_ATTACKS, **_CONTENT_ATTACKS}[attack]
    with answering(b"x", piece=_sends(*sent)) as server, _within_bounds():
        file = tmp_path / "key.json"
        file.write_text(json.dumps({**google.key_file(), "token_uri": f"http://127.0.0.1:{server.port}/token"}))
        place = {"GOOGLE_APPLICATION_CREDENTIALS": str(file)}
        if kind == "metadata":
            place = {"GCE_METADATA_HOST": f"127.0.0.1:{server.port}", "NO_GCE_CHECK": "false"}
        storage = opened(MX_GCS_ENDPOINT=google.url, MX_GCS_READ_TIMEOUT_SECONDS=_READ_TIMEOUT_SECONDS, **place)
        with pytest.raises(BackendError):
            storage.stat("model/a")
    assert [] == google.requests
