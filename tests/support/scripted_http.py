"""HTTP servers that give each request the answer that a function returns, and pass others on to a real server."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from attrs import frozen

__all__ = ["Answer", "Request", "pass_on", "serving"]

#: Status, headers and body.
Answer = tuple[int, Mapping[str, str], bytes]


@frozen
class Request:
    """What a client sent.

    Attributes:
        method: ``GET``, ``HEAD``, ``PUT`` or ``POST``.
        path: With the query.
        headers: By name, in any case.
        body: All of it.
    """

    method: str
    path: str
    headers: Message
    body: bytes


@contextlib.contextmanager
def serving(answer: Callable[[Request], Answer | None], context: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of a server that gives each request the answer; None closes the connection without one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two writes

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            given = answer(Request(self.command, self.path, self.headers, body))
            if given is None:
                self.close_connection = True
                return
            status, headers, content = given
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            self.close_connection = "Content-Length" in headers and self.command != "HEAD"

        do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815 - the names that http.server wants

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, *_: object) -> None:
            pass  # clients that go away are what some tests are about

    with Server(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def pass_on(request: Request, port: int) -> Answer:
    """The answer of the server on ``port`` of this machine to ``request``, whose headers stay as they are."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            connection.putheader(name, value)
        connection.endheaders(request.body or None)
        response = connection.getresponse()
        of_connection = {"Connection", "Transfer-Encoding"}
        headers = {name: value for name, value in response.getheaders() if name not in of_connection}
        body = response.read()
    if request.method != "HEAD":
        headers.pop("Content-Length", None)  # as long as the body is, and the connection stays
    return response.status, headers, body
