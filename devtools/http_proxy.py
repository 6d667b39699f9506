"""A small HTTP proxy: tunnels (CONNECT) and requests in absolute form, with or without a password."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

__all__ = ["HttpProxy"]


class HttpProxy:
    """Listens on ``127.0.0.1:port`` during the ``with`` block.

    Args:
        authorization: The required Proxy-Authorization header; empty for none.
        context: TLS with the clients; None for plain text.
        answer: An answer to CONNECT instead of a tunnel.
        route: Maps host and port to the address to connect to; unchanged by default.

    Attributes:
        tunnels: Host and port of each CONNECT so far.
        requests: First line of each request in absolute form so far.
        headers: The headers of all these requests, with names in lower case.
    """

    def __init__(
        self,
        *,
        authorization: str = "",
        context: ssl.SSLContext | None = None,
        answer: bytes = b"",
        route: Callable[[str, int], tuple[str, int]] = lambda host, port: (host, port),
    ) -> None:
        self.tunnels: list[str] = []
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self._authorization = authorization
        self._context = context
        self._answer = answer
        self._route = route
        self._closing = threading.Event()

    def __enter__(self) -> HttpProxy:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._listener.close()

    @property
    def url(self) -> str:
        """The URL of the proxy, without credentials."""
        return f"http{'' if self._context is None else 's'}://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        while not self._closing.is_set():
            if select.select([self._listener], [], [], 0.02)[0]:
                client = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as closing:
            if self._context is not None:
                client = self._context.wrap_socket(client, server_side=True)
            closing.enter_context(client)
            server: socket.socket | None = None
            with contextlib.ExitStack() as stack:
                while (received := _head(client)) is not None:
                    first, headers, rest = received
                    self.headers.append(headers)
                    method, target, _ = first.split(" ", 2)
                    if self._authorization and headers.get("proxy-authorization") != self._authorization:
                        client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                        continue
                    if method == "CONNECT":
                        self.tunnels.append(target)
                        self._tunnel(client, target)
                        return
                    self.requests.append(first)
                    url = urlsplit(target)
                    if server is None:
                        address = self._route(url.hostname or "", url.port or 80)
                        server = stack.enter_context(socket.create_connection(address))
                    path = f"{url.path or '/'}?{url.query}" if url.query else url.path or "/"
                    kept = {name: value for name, value in headers.items() if name != "proxy-authorization"}
                    lines = "".join(f"{name}: {value}\r\n" for name, value in kept.items())
                    server.sendall(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + rest)
                    if not self._relay_answer(server, client):
                        return

    def _tunnel(self, client: socket.socket, target: str) -> None:
        if self._answer:
            client.sendall(self._answer)
            return
        host, _, port = target.rpartition(":")
        with socket.create_connection(self._route(host.strip("[]"), int(port))) as server:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            self._relay(client, server)

    def _relay_answer(self, server: socket.socket, client: socket.socket) -> bool:
        """Relay the answer until the client sends its next request; return False if a side closed."""
        while not self._closing.is_set():
            ready = select.select([server, client], [], [], 0.02)[0]
            if server in ready:
                piece = server.recv(1 << 16)
                if not piece:
                    return False
                client.sendall(piece)
            elif client in ready:
                return True
        return False

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        def pump(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while piece := source.recv(1 << 16):
                    target.sendall(piece)
            for sock in (source, target):
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

        back = threading.Thread(target=pump, args=(server, client), daemon=True)
        back.start()
        pump(client, server)
        back.join()


def _head(client: socket.socket) -> tuple[str, dict[str, str], bytes] | None:
    """Return first line, headers, and the bytes after them."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = client.recv(1 << 16)
        if not piece:
            return None
        received += piece
    head, _, rest = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return first, headers, rest
