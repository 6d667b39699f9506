"""A server of byte ranges with configurable latency and bandwidth in a separate process, and a storage for it.

A request is an offset and a length; the answer is that many bytes of a file that repeats after ``PATTERN_BYTES``. The
first byte of each answer is sent after the latency. All connections share the bandwidth: they alternate by slices of
``_SLICE_BYTES``, in the order of their requests. The server sends with ``sendfile``, so that it uses little of the
CPUs that it shares with its clients.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import BackendError, UnavailableError

__all__ = ["PATTERN_BYTES", "Bandwidth", "RangeServer", "RangeStorage", "pattern"]

#: Period of the file: it repeats after this many bytes.
PATTERN_BYTES = 8 << 20

_REQUEST = struct.Struct("<QQ")
_SLICE_BYTES = 128 << 10
_UNSHAPED_BYTES = 8 << 20


def pattern() -> bytes:
    """Return the bytes that the file repeats."""
    return random.Random(20).randbytes(PATTERN_BYTES)


class Bandwidth:
    """A limit of bytes per second that all callers share.

    Args:
        bytes_per_second: The limit; None for no limit.
        burst_seconds: Unused bandwidth of this time may be used later. Waits shorter than this are added to the next
            ones, because a sleep takes longer than the shortest waits.
    """

    def __init__(self, bytes_per_second: float | None, burst_seconds: float = 0.002) -> None:
        self._rate = bytes_per_second
        self._burst_seconds = burst_seconds
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, count: int) -> None:
        """Wait until ``count`` bytes may pass."""
        if self._rate is None:
            return
        with self._lock:
            end = max(time.monotonic() - self._burst_seconds, self._free_at) + count / self._rate
            self._free_at = end
        wait = end - time.monotonic()
        if wait > self._burst_seconds:
            time.sleep(wait)


class RangeServer:
    """The server, which runs during the ``with`` block.

    Args:
        latency_seconds: Time before the first byte of each answer.
        bytes_per_second: Bandwidth of all connections together; None for no limit.
    """

    def __init__(self, latency_seconds: float, bytes_per_second: float | None) -> None:
        self._arguments = [str(latency_seconds), str(bytes_per_second or 0)]
        self.port = 0

    def __enter__(self) -> RangeServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.range_server", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class RangeStorage:
    """Reads from a RangeServer, with one connection per concurrent read. Thread-safe."""

    def __init__(self, port: int, size: int) -> None:
        self._port = port
        self._size = size
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._all: list[socket.socket] = []
        self._closed = False

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List the only file."""
        yield self.stat(prefix)

    def stat(self, path: str) -> ObjectInfo:
        """Return the size of the only file."""
        return ObjectInfo(path, self._size)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:  # noqa: ARG002 - the protocol's
        """Request a range, and receive it into ``buffer``."""
        connection = self._connection()
        try:
            connection.sendall(_REQUEST.pack(offset, len(buffer)))
            done = 0
            while done < len(buffer):
                count = connection.recv_into(buffer[done:], 0, socket.MSG_WAITALL)
                if not count:
                    raise ConnectionError
                done += count
        except OSError as exc:
            cls = BackendError if self._closed else UnavailableError
            raise cls(str(exc), uri=path, operation="read", provider="benchmarks") from exc
        with self._lock:
            self._idle.append(connection)
        return done

    def close(self) -> None:
        """Shut all connections down."""
        with self._lock:
            self._closed = True
            connections, self._all, self._idle = self._all, [], []
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _connection(self) -> socket.socket:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._all.append(connection)
        return connection


# -- in the server's process ------------------------------------------------------------------------------------------


def _answer(
    connection: socket.socket, file: int, latency_seconds: float, bandwidth: Bandwidth, slice_bytes: int
) -> None:
    with connection, contextlib.suppress(OSError):
        while len(request := connection.recv(_REQUEST.size, socket.MSG_WAITALL)) == _REQUEST.size:
            offset, length = _REQUEST.unpack(request)
            time.sleep(latency_seconds)
            while length:
                count = min(length, slice_bytes, PATTERN_BYTES - offset % PATTERN_BYTES)
                bandwidth.take(count)
                begin, end = offset % PATTERN_BYTES, offset % PATTERN_BYTES + count
                while begin < end:
                    begin += os.sendfile(connection.fileno(), file, begin, end - begin)
                offset, length = offset + count, length - count


def _serve(latency_seconds: float, bytes_per_second: float | None) -> None:
    file = os.memfd_create("pattern")
    os.write(file, pattern())
    bandwidth = Bandwidth(bytes_per_second)
    slice_bytes = _SLICE_BYTES if bytes_per_second else _UNSHAPED_BYTES
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(
                target=_answer, args=(connection, file, latency_seconds, bandwidth, slice_bytes), daemon=True
            ).start()


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("latency_seconds", type=float)
    parser.add_argument("bytes_per_second", type=float)
    arguments = parser.parse_args()
    _serve(arguments.latency_seconds, arguments.bytes_per_second or None)


if __name__ == "__main__":
    _main()
