"""A client of gRPC that speaks HTTP/2 frame by frame, and so does what no real client does."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import time
from collections.abc import Iterable
from types import TracebackType

__all__ = ["Http2", "run_all"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_FRAME_BYTES = 16384
_INITIAL_WINDOW = 65535


class Http2:
    """A connection. It grants the server the initial windows, and never more: what does not fit stays in the server.

    Args:
        target: ``host:port``.
        reads: It keeps what it gets, and grants the server as much again.

    Attributes:
        data: What it kept, by stream.
        ended: Streams that the server has ended.
        received_bytes: Bytes of data that the server has sent.
    """

    def __init__(self, target: str, *, reads: bool = False) -> None:
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=10)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, b""))
        self._buffer = b""
        self._window = _INITIAL_WINDOW
        self._stream_window = _INITIAL_WINDOW
        self._windows: dict[int, int] = {}
        self._unsent: dict[int, bytes] = {}
        self._next = 1
        self.ended: set[int] = set()
        self.received_bytes = 0
        self.data: dict[int, bytearray] = {}
        self._reads = reads
        self._target = target

    def __enter__(self) -> Http2:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.close()

    def call(self, path: str, message: bytes = b"", *, declared_bytes: int | None = None) -> int:
        """Begin a call, and return its stream.

        Args:
            path: ``/package.Service/Method``.
            message: What is sent of the message.
            declared_bytes: The length that is announced. If it is more, the message stays unfinished.
        """
        stream = self._next
        self._next += 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": self._target,
            "te": "trailers",
            "content-type": "application/grpc",
        }
        self._send(_frame(_HEADERS, _END_HEADERS, stream, b"".join(_field(*each) for each in fields.items())))
        size = len(message) if declared_bytes is None else declared_bytes
        self._windows[stream] = self._stream_window
        self._unsent[stream] = struct.pack(">BI", 0, size) + message
        if declared_bytes is None:
            assert len(self._unsent[stream]) <= min(self._window, self._stream_window)
            self._window -= len(self._unsent[stream])
            self._send(_frame(_DATA, _END_STREAM, stream, self._unsent.pop(stream)))
        return stream

    def run(self, seconds: float) -> None:
        """Send what the server's windows allow, and take what it sends, for some time."""
        run_all([self], seconds)

    def runs(self, seconds: float) -> bool:
        """As ``run``, for conditions: true."""
        self.run(seconds)
        return True

    # -- what `run_all` calls --

    def step(self) -> None:
        """Read once, and answer and send what is possible."""
        with contextlib.suppress(BlockingIOError):
            received = self._socket.recv(1 << 20)
            if not received:
                raise ConnectionResetError
            self._buffer += received
        while len(self._buffer) >= 9:
            size = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < 9 + size:
                break
            kind, flags, stream = (
                self._buffer[3],
                self._buffer[4],
                int.from_bytes(self._buffer[5:9], "big") & 0x7FFFFFFF,
            )
            self._handle(kind, flags, stream, self._buffer[9 : 9 + size])
            self._buffer = self._buffer[9 + size :]
        self._pump()

    def fileno(self) -> int:
        return self._socket.fileno()

    def block(self, blocking: bool) -> None:
        self._socket.setblocking(blocking)

    def _handle(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            for start in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[start : start + 6])
                if name == 4:  # the initial window of streams
                    change = value - self._stream_window
                    self._stream_window = value
                    self._windows = {each: window + change for each, window in self._windows.items()}
            self._send(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._send(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            if stream == 0:
                self._window += more
            elif stream in self._windows:
                self._windows[stream] += more
        elif kind == _DATA:
            self.received_bytes += len(payload)
            self._keep(stream, payload)
        if kind == _RST_STREAM or (kind in {_DATA, _HEADERS} and flags & _END_STREAM):
            self.ended.add(stream)
            self._unsent.pop(stream, None)

    def _keep(self, stream: int, payload: bytes) -> None:
        if self._reads and payload:
            self.data.setdefault(stream, bytearray()).extend(payload)
            more = len(payload).to_bytes(4, "big")
            self._send(_frame(_WINDOW_UPDATE, 0, 0, more) + _frame(_WINDOW_UPDATE, 0, stream, more))

    def _pump(self) -> None:
        for stream in [*self._unsent]:
            unsent = self._unsent[stream]
            size = min(len(unsent), self._window, self._windows[stream], _FRAME_BYTES)
            while size > 0:
                self._send(_frame(_DATA, 0, stream, unsent[:size]))
                unsent = unsent[size:]
                self._unsent[stream] = unsent
                self._window -= size
                self._windows[stream] -= size
                size = min(len(unsent), self._window, self._windows[stream], _FRAME_BYTES)

    def _send(self, data: bytes) -> None:
        self._socket.setblocking(True)
        self._socket.sendall(data)
        self._socket.setblocking(False)


def run_all(connections: Iterable[Http2], seconds: float) -> None:
    """Run several connections at the same time."""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            connection.block(False)
            connection.step()
            selector.register(connection, selectors.EVENT_READ, connection)
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                key.data.step()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _field(name: str, value: str) -> bytes:
    """A header field, literally and not indexed (RFC 7541, 6.2.2)."""
    return b"\0" + _text(name) + _text(value)


def _text(text: str) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()
