"""Servers that answer byte for byte, for what no real HTTP server sends."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import trustme
from attrs import define, field

__all__ = ["ByteServer", "answering", "server_context"]


@define
class ByteServer:
    """A server under way.

    Attributes:
        port: Its TCP port.
        requests: The heads of all requests so far.
        connections: Number of connections so far.
    """

    port: int
    requests: list[bytes] = field(factory=list)
    connections: int = 0

    def first_lines(self) -> list[str]:
        return [request.split(b"\r\n")[0].decode() for request in self.requests]

    def header(self, name: str) -> list[str]:
        """The values of a header in all requests."""
        lines = [line.decode() for request in self.requests for line in request.split(b"\r\n")[1:]]
        return [line.partition(": ")[2] for line in lines if line.lower().startswith(f"{name.lower()}:")]


@contextlib.contextmanager
def answering(
    answer: Callable[[bytes], bytes | None] | bytes,
    *,
    host: str = "127.0.0.1",
    context: ssl.SSLContext | None = None,
    piece: Callable[[socket.socket, bytes], None] = lambda sock, content: sock.sendall(content),
) -> Iterator[ByteServer]:
    """A server that gives each request of a connection the answer, and closes it after one of None.

    Args:
        answer: To a request head; None closes the connection.
        host: Where it listens.
        context: TLS.
        piece: How an answer is sent.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening, contextlib.ExitStack() as stack:
        server = ByteServer(listening.getsockname()[1])
        lock = threading.Lock()

        def serve(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), contextlib.ExitStack() as closing:
                if context is not None:
                    connection = context.wrap_socket(connection, server_side=True)
                closing.enter_context(connection)
                while True:
                    request = b""
                    while b"\r\n\r\n" not in request:
                        received = connection.recv(65536)
                        if not received:
                            return
                        request += received
                    with lock:
                        server.requests.append(request)
                    content = answer(request) if callable(answer) else answer
                    if content is None:
                        return
                    piece(connection, content)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    server.connections += 1
                    stack.callback(connection.close)
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def server_context(directory: Path, *names: str) -> tuple[ssl.SSLContext, str]:
    """TLS for a server with these names, and the file with the authority that vouches for it."""
    authority = trustme.CA()
    file = directory / "authority.pem"
    authority.cert_pem.write_to_path(str(file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context, str(file)
