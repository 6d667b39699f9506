"""A TCP proxy that misbehaves on request: what a network can do to a response."""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import struct
import termios
import threading
from collections.abc import Callable
from typing import Literal

from attrs import frozen

__all__ = ["Fault", "TcpProxy"]

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@frozen
class Fault:
    """What happens to one response.

    Attributes:
        kind: ``"reset"`` and ``"truncate"`` end the connection (hard, or as if all were sent), ``"stall"`` keeps it
            open and sends nothing more, ``"delay"`` waits ``seconds`` once, ``"flip"`` inverts one byte.
        after_bytes: Bytes of the response, headers included, that pass before.
        seconds: How long a delay is.
    """

    kind: Literal["reset", "truncate", "stall", "delay", "flip"]
    after_bytes: int = 0
    seconds: float = 0.0


#: Called with the number of the request (from 0, over all connections) and its first bytes.
Policy = Callable[[int, bytes], "Fault | None"]


class TcpProxy:
    """Stands in front of ``host:port`` between ``with`` and its end.

    A request begins with the first bytes that a client sends on a connection or after a response to it; that is
    right for HTTP without pipelining.

    Args:
        host: Host of the server behind.
        port: Port of the server behind.
        policy: Says what happens to the response to each request; by default nothing.
    """

    def __init__(self, host: str, port: int, policy: Policy | None = None) -> None:
        self.policy: Policy = policy or (lambda _number, _head: None)
        self.connections = 0
        self.requests = 0
        self._behind = (host, port)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> TcpProxy:
        self._listener = socket.create_server(("127.0.0.1", 0))
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
        client.settimeout(10)  # bounds what a client that stopped reading can hold up
        fault, passed, answered = None, 0, True
        while not self._closing.is_set():
            ready = select.select([client, server], [], [], 0.05)[0]
            if client in ready:
                count = client.recv_into(buffer)
                if not count:
                    return
                if answered:
                    with self._lock:
                        number, self.requests = self.requests, self.requests + 1
                    fault, passed, answered = self.policy(number, bytes(buffer[:count])), 0, False
                server.sendall(buffer[:count])
            if server in ready:
                count = server.recv_into(buffer)
                if not count:
                    return
                answered = True
                if fault is not None and passed + count > fault.after_bytes:
                    before = fault.after_bytes - passed
                    client.sendall(buffer[:before])
                    if not self._strike(fault, client, buffer[before:count]):
                        return
                    fault = None
                else:
                    client.sendall(buffer[:count])
                passed += count

    def _strike(self, fault: Fault, client: socket.socket, rest: memoryview) -> bool:
        """Do what ``fault`` says; whether the connection lives on."""
        if fault.kind in {"reset", "truncate"}:
            if fault.kind == "reset":
                # A reset throws away what was not yet acknowledged, and that is to pass.
                while struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)))[0]:
                    self._closing.wait(0.001)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            return False
        if fault.kind == "flip":
            rest[0] ^= 0xFF
        else:
            self._closing.wait(fault.seconds if fault.kind == "delay" else None)
        client.sendall(rest)
        return True
