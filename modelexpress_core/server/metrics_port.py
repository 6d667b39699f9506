"""The HTTP port of the Prometheus metrics: bounded in time and connections, and with a token if one is set."""

from __future__ import annotations

import errno
import hmac
import logging
import socket
import threading
import time
from collections.abc import Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from modelexpress_core.errors import SettingsError
from modelexpress_core.resources import start_thread
from modelexpress_core.wire.files import WatchedFiles, read_bytes

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["MetricsPort", "read_token"]

_log = logging.getLogger(__name__)

#: Connections at the same time; further ones are closed at once.
_MOST_CONNECTIONS = 32

#: Pause after a connection that could not be accepted, and between two lines of the log about it.
_PAUSE_SECONDS = 0.2
_LOG_SECONDS = 30.0

_OUT_OF_FILES = {errno.EMFILE, errno.ENFILE}


class MetricsPort:
    """Serves ``/metrics`` in threads of its own until it is closed.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 is any free one.
        registry: The metrics.
        token_path: File with the bearer token that callers need; None to answer every caller.
        connection_seconds: How long a connection may last: to send its request, and to read the answer.

    Attributes:
        port: The port it listens on.

    Raises:
        OSError: It cannot listen on the address.
        SettingsError: The file has no token.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        token_path: str | None = None,
        *,
        connection_seconds: float = 10.0,
    ) -> None:
        app: WSGIApplication = make_wsgi_app(registry)
        if token_path is not None:
            app = _WithToken(app, token_path)
        family, *_, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        self._server = _Server(family, address, connection_seconds)
        self._server.set_app(app)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="mx-metrics", daemon=True)
        try:
            start_thread(self._thread, "serve the metrics")
        except BaseException:
            self._server.server_close()
            raise

    def close(self) -> None:
        """Close the port and its connections."""
        self._server.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the base class
        """Log nothing: callers choose the text."""


class _Server(ThreadingMixIn, WSGIServer):
    """A WSGI server with a thread for each connection, within limits."""

    daemon_threads = True
    request_queue_size = 128
    block_on_close = False

    def __init__(self, family: int, address: Any, connection_seconds: float) -> None:  # noqa: ANN401 - of the family
        self.address_family = family
        self._connection_seconds = connection_seconds
        self.closing = threading.Event()
        self._deadlines: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._logged_at = -_LOG_SECONDS
        super().__init__(address[:2], _Handler)

    def server_bind(self) -> None:
        """Bind without the look-up of the host's name that the base class does."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. If the process is out of file descriptors, log it and pause: the port stays readable."""
        try:
            return super().get_request()
        except OSError as exc:
            if exc.errno in _OUT_OF_FILES:
                now = time.monotonic()
                if now - self._logged_at >= _LOG_SECONDS:
                    self._logged_at = now
                    _log.error(
                        "the metrics port accepts no connection: %s; close clients, or raise the limit (ulimit -n)", exc
                    )
                self.closing.wait(_PAUSE_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in the base class
        """Answer in a thread, or close the connection if there are too many."""
        with self._lock:
            full = len(self._deadlines) >= _MOST_CONNECTIONS
            if not full:
                self._deadlines[request] = time.monotonic() + self._connection_seconds
        if full:
            super().shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 - as in the base class
        """Close a connection."""
        with self._lock:
            self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End connections that take too long, however slowly they send. Called twice a second."""
        now = time.monotonic()
        with self._lock:
            for request, deadline in self._deadlines.items():
                if now >= deadline:
                    _end(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 - as in the base class
        """Log at level debug: callers break connections."""
        _log.debug("a request for metrics failed", exc_info=True)


def _end(connection: socket.socket) -> None:
    """End both directions; the thread that reads or writes then fails."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has ended
        return


class _WithToken:
    """``app`` for callers with the bearer token of a file, which is read again when it changes."""

    def __init__(self, app: WSGIApplication, path: str) -> None:
        self._app = app
        self._files = WatchedFiles((path,), lambda: read_token(path))

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer with 401 unless the token is right."""
        shown = str(environ.get("HTTP_AUTHORIZATION", "")).encode("utf-8", "replace")
        if hmac.compare_digest(shown, b"Bearer " + self._files.value()):
            return self._app(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
        return [b"a bearer token is needed: the one in the file that MX_METRICS_TOKEN_PATH names\n"]


def read_token(path: str) -> bytes:
    """The token in the file at ``path``.

    Raises:
        SettingsError: The file cannot be read, or holds none.
    """
    token = read_bytes(path, "MX_METRICS_TOKEN_PATH").strip()
    if len(token.split()) != 1:
        message = f"the file that MX_METRICS_TOKEN_PATH names holds no token: {path}"
        raise SettingsError(message, hint="the file must hold the token, one word, and nothing else")
    return token
