"""The server's end of the bulk channel: a thread for each connection, which sends memory and files as they are.

Without a valid ticket nothing is answered. All that strangers can use up is bounded: connections, time until a request
is complete, size of a request.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, Protocol

from modelexpress_core.bulk.output import CHECKSUM_BYTES, PIECE_BYTES, Output
from modelexpress_core.bulk.requests import MAX_RUNS, BulkRequest, RefusedError, Run, read_request
from modelexpress_core.bulk.tickets import Ticket, Tickets
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.resources import start_thread
from modelexpress_core.storage.http.connections import Connection

__all__ = ["CHECKSUM_BYTES", "PIECE_BYTES", "BulkServer", "BulkSource", "Content"]

_log = logging.getLogger(__name__)

#: Connections in all, and those of them that have shown no ticket yet.
_MAX_CONNECTIONS = 256
_MAX_STRANGERS = 64

#: How long the first request of a connection may take, and a next one.
_FIRST_REQUEST_SECONDS = 10.0
_IDLE_SECONDS = 75.0

#: How long the rest of a request that was refused is read.
_LINGER_SECONDS = 1.0

#: How long a new connection waits until there is room.
_ROOM_SECONDS = 1.0

#: Connections that the kernel keeps until they are accepted.
_BACKLOG = 128


class Content(Protocol):
    """Bytes that can be sent."""

    @property
    def nbytes(self) -> int:
        """How many there are."""
        ...

    def send(self, output: Output, run: Run) -> None:
        """Give ``output`` the bytes of ``run``, which lies within these."""
        ...

    def close(self) -> None:
        """Release what this holds, at the end of a request."""
        ...


class BulkSource(Protocol):
    """What a server reads from. Its methods are called by many threads."""

    def holds(self, ticket: Ticket) -> bool:
        """Whether the lease of a ticket lasts, so that the bytes are unchanged."""
        ...

    def content(self, ticket: Ticket, name: str) -> Content | None:
        """The bytes of ``name``, for one request; None if there is no such name, or the ticket does not include it."""
        ...

    def count_sent(self, ticket: Ticket, nbytes: int) -> None:
        """Note that bytes were sent to the reader of a ticket."""
        ...


class BulkServer:
    """Serves a source until ``close``.

    Args:
        source: What is served.
        tickets: Verifies the tickets that readers show.
        host: Address to listen on; empty for all addresses.
        port: Port to listen on; any free port if it is in use.
        tls: Returns the context of each TLS connection; None for plain text.
        max_connections: How many there may be. The one that has been idle longest makes room for a new one.
        max_names: How many names one request may ask for, each of which may be an open file.

    Attributes:
        port: The port it listens on.

    Raises:
        ModelExpressError: It cannot listen on the address.
        ResourceError: The system starts no more threads.
    """

    def __init__(
        self,
        source: BulkSource,
        tickets: Tickets,
        *,
        host: str = "",
        port: int = 0,
        tls: Callable[[], ssl.SSLContext] | None = None,
        max_connections: int | None = None,
        max_names: int = MAX_RUNS,
    ) -> None:
        self._source = source
        self._tickets = tickets
        self._tls = tls
        self._max_connections = max_connections
        self._max_names = max_names
        self._changed = threading.Condition()
        #: The state of each open connection; of those in one state, the one first that has been in it longest.
        self._connections: dict[Any, _State] = {}
        self._closed = False
        self._listening = _listen(host, port)
        self.port: int = self._listening.getsockname()[1]
        self._waking, self._woken = socket.socketpair()
        try:
            start_thread(threading.Thread(target=self._accept, name="mx-bulk", daemon=True), "serve the bulk channel")
        except BaseException:
            self._release_sockets()
            raise

    def close(self) -> None:
        """Close all connections; when it returns, nothing reads the source any more. May be called more than once."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._waking.close()
            for sock in self._connections:
                _shut_down(sock)
            self._changed.wait_for(lambda: not self._connections)

    # -- connections ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        try:
            while True:
                poll.poll()
                if self._closed:
                    return
                try:
                    sock, _ = self._listening.accept()
                except OSError as exc:  # out of descriptors, or the client is gone
                    _log.debug("a connection was not accepted: %s", exc)
                    self._woken.settimeout(0.1)  # a limit may be lifted, and this thread must not spin
                    with contextlib.suppress(OSError):
                        self._woken.recv(1)
                    continue
                self._begin(sock)
        finally:
            self._release_sockets()

    def _release_sockets(self) -> None:
        self._listening.close()
        self._waking.close()
        self._woken.close()

    def _begin(self, sock: socket.socket) -> None:
        with self._changed:
            if not self._has_room():
                sock.close()
                return
            self._connections[sock] = _State.STRANGER
        try:
            thread = threading.Thread(target=self._serve, args=(sock,), name="mx-bulk-connection", daemon=True)
            start_thread(thread, "serve a reader")
        except ModelExpressError as exc:
            _log.warning("a reader of the bulk channel is turned away: %s", exc)
            self._forget(sock)

    def _has_room(self) -> bool:
        """Whether there is room for one more connection, for which the oldest stranger, or an idle one, may have to go.

        The lock is held; it is given up while a connection that was shut down ends.
        """
        most = self._max_connections or _MAX_CONNECTIONS
        strangers = [sock for sock, state in self._connections.items() if state is _State.STRANGER]
        idle = (sock for sock, state in self._connections.items() if state is _State.IDLE)
        leaving = None
        if len(strangers) >= _MAX_STRANGERS or (strangers and len(self._connections) >= most):
            leaving = strangers[0]
        elif len(self._connections) >= most:
            leaving = next(idle, None)
        if leaving is not None:
            _shut_down(leaving)
            self._connections[leaving] = _State.LEAVING
        self._changed.wait_for(lambda: self._closed or len(self._connections) < most, _ROOM_SECONDS)
        return not self._closed and len(self._connections) < most

    def _enter(self, sock: socket.socket, state: _State) -> None:
        with self._changed:
            if self._connections.pop(sock) is _State.LEAVING:
                state = _State.LEAVING
            self._connections[sock] = state

    def _forget(self, sock: socket.socket) -> None:
        with self._changed:
            self._connections.pop(sock, None)
            self._changed.notify_all()
        sock.close()

    def _serve(self, sock: socket.socket) -> None:
        """Answer the requests of one connection."""
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            encrypted = self._encrypted(sock) if self._tls else sock
            try:
                self._answer_all(sock, Connection(encrypted), _names_of(encrypted))
            finally:
                if encrypted is not sock:
                    encrypted.close()
        except OSError as exc:
            _log.debug("a connection of the bulk channel ended: %s", exc)
        except Exception:  # noqa: BLE001 - a defect of ours ends one connection, and not the server
            _log.exception("a connection of the bulk channel failed")
        finally:
            self._forget(sock)

    def _encrypted(self, sock: socket.socket) -> ssl.SSLSocket:
        assert self._tls is not None  # noqa: S101 - for the type checker: the caller has looked
        sock.settimeout(_FIRST_REQUEST_SECONDS)
        # Another socket object for the same connection: the first one stays in the list, to be shut down.
        secure = self._tls().wrap_socket(sock.dup(), server_side=True, do_handshake_on_connect=False)
        try:
            secure.do_handshake()
        except BaseException:
            secure.close()
            raise
        return secure

    def _answer_all(self, sock: socket.socket, connection: Connection, names: frozenset[str]) -> None:
        idle_seconds = _FIRST_REQUEST_SECONDS
        while True:
            try:
                request = read_request(connection, idle_seconds)
                if request is None:
                    return
                ticket = self._ticket_of(request, names)
                self._enter(sock, _State.BUSY)
                self._answer(request, ticket, connection)
                self._enter(sock, _State.IDLE)
            except RefusedError as exc:
                _refuse(connection, exc)
                return
            idle_seconds = _IDLE_SECONDS

    # -- requests ------------------------------------------------------------------------------------------------------

    def _ticket_of(self, request: BulkRequest, names: frozenset[str]) -> Ticket:
        ticket = self._tickets.verified(request.ticket)
        if ticket is None or (ticket.reader and ticket.reader not in names) or not self._source.holds(ticket):
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "a ticket is wanted whose lease lasts")
        if ticket.content != request.content:
            raise RefusedError(HTTPStatus.FORBIDDEN, "the ticket is for other bytes")
        return ticket

    def _answer(self, request: BulkRequest, ticket: Ticket, connection: Connection) -> None:
        version = f'"{ticket.version}"'
        if request.headers.get("if-match", version) != version:
            raise RefusedError(HTTPStatus.PRECONDITION_FAILED, "it has another version")
        lines = [f"ETag: {version}", "Accept-Ranges: bytes", "Content-Type: application/octet-stream"]
        with contextlib.ExitStack() as opened:
            contents = _Opened(self._source, ticket, opened, self._max_names)
            if request.method == "POST":
                runs, checksums = request.runs(connection)
                parts = [(contents.of(run), run) for run in runs]
                length = sum(run.nbytes + checksums * CHECKSUM_BYTES * -(-run.nbytes // PIECE_BYTES) for run in runs)
                status = HTTPStatus.OK
            else:
                content = contents.of(Run(request.name, 0, 0))
                start, end, partial = request.range_of(content.nbytes)
                if partial:
                    lines.append(f"Content-Range: bytes {start}-{end - 1}/{content.nbytes}")
                status = HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK
                parts, checksums, length = [(content, Run(request.name, start, end - start))], False, end - start
            head = _head(status, [*lines, f"Content-Length: {length}"])
            if request.method == "HEAD":
                connection.send_all(head)
                return
            output = Output(
                connection,
                head,
                checksums=checksums,
                is_ended=lambda: self._closed or not self._source.holds(ticket),
                count_sent=lambda nbytes: self._source.count_sent(ticket, nbytes),
            )
            for content, run in parts:
                output.send(content, run)
            output.finish()


class _State(enum.Enum):
    """What a connection does."""

    STRANGER = enum.auto()  # it has shown no ticket yet
    BUSY = enum.auto()  # a request of it is answered
    IDLE = enum.auto()  # it may send a next request
    LEAVING = enum.auto()  # it was shut down, and ends by itself


class _Opened:
    """The contents of one request, each opened once."""

    def __init__(self, source: BulkSource, ticket: Ticket, opened: contextlib.ExitStack, max_names: int) -> None:
        self._source = source
        self._ticket = ticket
        self._opened = opened
        self._max_names = max_names
        self._contents: dict[str, Content] = {}

    def of(self, run: Run) -> Content:
        """The content that ``run`` lies in."""
        content = self._contents.get(run.name)
        if content is None and len(self._contents) == self._max_names:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {self._max_names} names")
        if content is None:
            content = self._source.content(self._ticket, run.name)
            if content is not None:
                self._contents[run.name] = content
                self._opened.callback(content.close)
        if content is None or run.end > content.nbytes:
            where = f" with bytes {run.offset} to {run.end - 1}" if content else ""
            raise RefusedError(HTTPStatus.NOT_FOUND, f"there is no {run.name[:200]!r}{where}")
        return content


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; on any free port, if ``port`` is in use."""
    dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
    for wanted in dict.fromkeys((port, 0)):
        try:
            return socket.create_server((host, wanted), family=family, dualstack_ipv6=dual, backlog=_BACKLOG)
        except OSError as exc:
            reason = exc
    message = f"the bulk channel cannot listen on {host or 'any address'}: {reason.strerror or reason}"
    raise ModelExpressError(message) from reason


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _names_of(sock: socket.socket) -> frozenset[str]:
    """The names in the certificate that the other side showed."""
    certificate: Any = sock.getpeercert() if isinstance(sock, ssl.SSLSocket) else None
    if not certificate:
        return frozenset()
    common = (value for part in certificate.get("subject", ()) for key, value in part if key == "commonName")
    return frozenset([*(value for _, value in certificate.get("subjectAltName", ())), *common])


def _head(status: HTTPStatus, lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status} {status.phrase}", *lines, "")).encode("latin-1")


def _refuse(connection: Connection, exc: RefusedError) -> None:
    content = f"{exc.reason}\n".encode()
    lines = [f"Content-Length: {len(content)}", "Content-Type: text/plain; charset=utf-8", "Connection: close"]
    if exc.status is HTTPStatus.UNAUTHORIZED:
        lines.append("WWW-Authenticate: Bearer")
    lines += [f"{name}: {value}" for name, value in exc.headers.items()]
    connection.wait_at_most(_FIRST_REQUEST_SECONDS)
    connection.send_all(_head(exc.status, lines) + content)
    # Closing a connection with bytes that nobody read resets it, and the client might not see the answer.
    part = memoryview(bytearray(64 << 10))
    deadline = time.monotonic() + _LINGER_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        connection.wait_at_most(left)
        if not connection.receive(part):
            return
