"""A TCP proxy that injects network faults into responses."""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import struct
import sys
import termios
import threading
from collections.abc import Callable
from typing import Literal

from attrs import frozen

__all__ = ["Fault", "TcpProxy"]

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
_END_OF_HEADERS = b"\r\n\r\n"


@frozen
class Fault:
    """The fault of one response.

    Attributes:
        kind: ``"reset"`` resets the connection, ``"truncate"`` closes it as if the response were complete, ``"stall"``
            keeps it open and sends no more, ``"delay"`` waits ``seconds`` once, ``"flip"`` inverts bits of one byte,
            ``"unavailable"`` answers HTTP 503 instead of the server.
        after_bytes: Bytes of the response that pass before the fault.
        of_body: Whether ``after_bytes`` are counted from the start of the HTTP body, not of the headers.
        seconds: Length of a delay.
        bits: The bits to invert.
    """

    kind: Literal["reset", "truncate", "stall", "delay", "flip", "unavailable"]
    after_bytes: int = 0
    of_body: bool = False
    seconds: float = 0.0
    bits: int = 0xFF


#: Called with the number of the request (from 0, over all connections) and its first bytes.
Policy = Callable[[int, bytes], "Fault | None"]


class _Answer:
    """One response, and the position of its fault."""

    def __init__(self, fault: Fault | None) -> None:
        self.refused = fault is not None and fault.kind == "unavailable"
        self._fault = None if self.refused else fault
        self._passed = 0
        self._head = bytearray()

    def next_fault(self, content: memoryview) -> tuple[Fault | None, int]:
        """Return the fault if it is in ``content``, the next bytes, and how many of these bytes pass before it."""
        fault = self._fault
        if fault is None:
            return None, len(content)
        start = 0
        if fault.of_body:
            if _END_OF_HEADERS not in self._head:
                self._head += content
            end = self._head.find(_END_OF_HEADERS)
            start = end + len(_END_OF_HEADERS) if end >= 0 else sys.maxsize
        before = start + fault.after_bytes - self._passed
        self._passed += len(content)
        if before >= len(content):
            return None, len(content)
        self._fault = None
        return fault, before


class TcpProxy:
    """Relays connections to ``host:port`` during the ``with`` block.

    A request begins with the first bytes that a client sends on a connection, or after a response. This is correct for
    HTTP without pipelining.

    Args:
        host: Host of the server.
        port: Port of the server.
        policy: Returns the fault for the response to each request; by default none.
        listen: The address to listen on.
        listen_port: The port to listen on; by default any free one.

    Attributes:
        connections: Connections so far.
        requests: Requests so far.
        sent_bytes: Bytes sent to clients so far, headers included.
    """

    def __init__(
        self,
        host: str,
        port: int,
        policy: Policy | None = None,
        *,
        listen: str = "127.0.0.1",
        listen_port: int = 0,
    ) -> None:
        self.policy: Policy = policy or (lambda _number, _head: None)
        self.connections = 0
        self.requests = 0
        self.sent_bytes = 0
        self._behind = (host, port)
        self._listen = listen
        self._listen_port = listen_port
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> TcpProxy:
        family = socket.AF_INET6 if ":" in self._listen else socket.AF_INET
        self._listener = socket.create_server((self._listen, self._listen_port), family=family)
        self.port: int = self._listener.getsockname()[1]
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                self.connections += 1
                self._spawn(self._serve, self._listener.accept()[0])

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._behind) as server, contextlib.suppress(OSError):
            self._relay(client, server)

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        buffer = memoryview(bytearray(1 << 18))
        client.settimeout(10)  # so that a client that stopped reading blocks only this long
        answer, answered = _Answer(None), True
        while not self._closing.is_set():
            ready = select.select([client, server], [], [], 0.05)[0]
            if client in ready:
                count = client.recv_into(buffer)
                if not count:
                    return
                if answered:
                    answer, answered = _Answer(self._fault(bytes(buffer[:count]))), False
                if answer.refused:
                    self._send(client, memoryview(_UNAVAILABLE))
                    answered = True
                else:
                    server.sendall(buffer[:count])
            if server in ready:
                count = server.recv_into(buffer)
                if not count:
                    return
                answered = True
                fault, before = answer.next_fault(buffer[:count])
                self._send(client, buffer[:before])
                if fault is not None and not self._inject(fault, client, buffer[before:count]):
                    return

    def _fault(self, request: bytes) -> Fault | None:
        with self._lock:
            number, self.requests = self.requests, self.requests + 1
        return self.policy(number, request)

    def _send(self, client: socket.socket, content: memoryview) -> None:
        client.sendall(content)
        with self._lock:
            self.sent_bytes += len(content)

    def _inject(self, fault: Fault, client: socket.socket, rest: memoryview) -> bool:
        """Apply ``fault``; return whether the connection stays open."""
        if fault.kind in {"reset", "truncate"}:
            if fault.kind == "reset":
                # A reset discards unacknowledged bytes, but those before the fault must arrive.
                while struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)))[0]:
                    self._closing.wait(0.001)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            return False
        if fault.kind == "flip":
            rest[0] ^= fault.bits
        else:
            self._closing.wait(fault.seconds if fault.kind == "delay" else None)
        self._send(client, rest)
        return True
