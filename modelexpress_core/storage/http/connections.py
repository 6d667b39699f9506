"""Connections to HTTP servers: opening them (TCP, a proxy's tunnel, TLS), keeping them for reuse, ending them."""

from __future__ import annotations

import itertools
import os
import select
import socket
import ssl
import struct
import sys
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

from modelexpress_core.storage.http.answers import Answer, read_head
from modelexpress_core.storage.http.failures import AuthoritiesError, BadAnswerError, ConnectTimeoutError, ProxyError
from modelexpress_core.storage.http.nested_tls import NestedTls
from modelexpress_core.storage.http.proxies import Proxies, Proxy
from modelexpress_core.storage.http.requests import Origin, Request

__all__ = ["Connection", "ConnectionPool", "OpenSockets"]

_S = TypeVar("_S", ssl.SSLSocket, NestedTls)

#: A connection that was idle for longer is not used again: servers and gateways drop such ones, some silently.
_MAX_IDLE_SECONDS = 60.0

#: Idle connections to one server; core never reads with more at once.
_MAX_IDLE_CONNECTIONS = 256

#: A wait of zero would be none at all.
_MIN_WAIT_SECONDS = 0.001

#: Parts that are sent with one system call: every system takes so many.
_MAX_GATHERED = 512

#: What poll reports of a connection that the other side ended.
_ENDED = getattr(select, "POLLRDHUP", select.POLLHUP)

#: Systems where the layout of a socket's own timeout is known.
_KERNEL_WAITS = sys.platform == "linux" and sys.maxsize > 2**32


class OpenSockets:
    """The sockets of one storage, so that closing it ends the waits of other threads. Thread-safe.

    Sockets need not be removed: those that are no longer referenced anywhere else are forgotten.

    Attributes:
        closed: ``shut_down`` was called.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[Any] = weakref.WeakSet()
        self.closed = False

    def __len__(self) -> int:
        with self._lock:
            return len(self._sockets)

    def add(self, sock: Any) -> None:  # noqa: ANN401 - a socket, or what wraps one
        """Add ``sock``, which has just been made.

        Raises:
            ConnectionAbortedError: They have been shut down; close ``sock``.
        """
        with self._lock:
            if self.closed:
                message = "the storage was closed"
                raise ConnectionAbortedError(message)
            self._sockets.add(sock)

    def shut_down(self) -> None:
        """End every read that waits for bytes, and refuse new sockets; called once or more often."""
        with self._lock:
            self.closed = True
            sockets = list(self._sockets)
        for sock in sockets:
            # Not sock.shutdown: for a TLS socket that also removes the TLS layer, and a thread that reads it would
            # take the encrypted bytes for the object's.
            with suppress(OSError):
                socket.socket.shutdown(getattr(sock, "socket", sock), socket.SHUT_RDWR)


class Connection:
    """One connection. Waits at most ``wait_seconds`` for each of its bytes.

    Args:
        sock: Connected.
        through_proxy: A proxy reads the requests.
        proxy_lines: Headers for that proxy.
    """

    def __init__(
        self, sock: socket.socket | NestedTls, *, through_proxy: bool = False, proxy_lines: bytes = b""
    ) -> None:
        self._sock = sock
        self._through_proxy = through_proxy
        self._proxy_lines = proxy_lines
        self._wait_seconds: float | None = None
        # A socket with one of Python's timeouts returns whatever has arrived. With a timeout of the kernel's own, it
        # returns when a piece is complete, which wakes the thread less often.
        self._kernel_waits = _KERNEL_WAITS and type(sock) is socket.socket
        self._whole_pieces = socket.MSG_WAITALL if self._kernel_waits else 0
        self._idle_since = 0.0

    def wait_at_most(self, seconds: float) -> None:
        """Limit the waits that begin from now on; to almost nothing, if ``seconds`` is not above zero."""
        seconds = max(seconds, _MIN_WAIT_SECONDS)
        if seconds == self._wait_seconds:
            return
        self._wait_seconds = seconds
        if self._kernel_waits and isinstance(self._sock, socket.socket):
            self._sock.setblocking(True)
            whole, rest = divmod(seconds, 1)
            timeout = struct.pack("@ll", int(whole), int(rest * 1e6))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        else:
            self._sock.settimeout(seconds)

    def send(self, request: Request) -> None:
        """Send ``request``.

        Raises:
            OSError: The connection broke, or took nothing in time.
        """
        self.send_all(request.encoded(through_proxy=self._through_proxy, proxy_lines=self._proxy_lines))

    def send_all(self, content: bytes | memoryview) -> None:
        """Send ``content``.

        Raises:
            OSError: The connection broke, or took nothing in time.
        """
        try:
            self._sock.sendall(content)
        except BlockingIOError as exc:  # from the kernel's timeout
            raise TimeoutError("timed out") from exc

    def send_gathered(self, parts: Sequence[bytes | memoryview], seconds: float) -> None:
        """Send ``parts``, one after another, in one system call where the system can do that.

        Raises:
            OSError: The connection broke, or did not take everything in ``seconds``.
        """
        if not self._kernel_waits or not isinstance(self._sock, socket.socket):
            for part in parts:
                self.send_all(part)
            return
        deadline = time.monotonic() + seconds
        left = deque(memoryview(part) for part in parts if part)
        while left:
            try:
                count = self._sock.sendmsg(itertools.islice(left, _MAX_GATHERED))
            except BlockingIOError as exc:  # from the kernel's timeout
                raise TimeoutError("timed out") from exc
            while left and count >= len(left[0]):
                count -= len(left.popleft())
            if count:
                left[0] = left[0][count:]
            if left and time.monotonic() > deadline:
                raise TimeoutError("the other side takes bytes too slowly")

    @property
    def sends_files(self) -> bool:
        """Whether ``send_file`` can be called: the system copies bytes of a file to this connection by itself."""
        return self._kernel_waits and hasattr(os, "sendfile")

    def send_file(self, descriptor: int, offset: int, count: int, seconds: float) -> None:
        """Send ``count`` bytes of a file, which do not pass through this program.

        Raises:
            EOFError: The file ends before.
            OSError: The connection broke, or did not take everything in ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while count:
            try:
                sent = os.sendfile(self._sock.fileno(), descriptor, offset, count)
            except BlockingIOError as exc:  # from the kernel's timeout
                raise TimeoutError("timed out") from exc
            if not sent:
                message = "the file ends before the bytes that were asked for"
                raise EOFError(message)
            offset, count = offset + sent, count - sent
            if count and time.monotonic() > deadline:
                raise TimeoutError("the other side takes bytes too slowly")

    def is_ended(self) -> bool:
        """Whether the other side has closed the connection, or its sending half."""
        poll = select.poll()
        poll.register(self._sock.fileno(), _ENDED)
        return bool(poll.poll(0))

    def receive(self, view: memoryview, *, whole: bool = False) -> int:
        """Put the next bytes into ``view``.

        Args:
            view: Where to.
            whole: Return only when it is full, where the system can do that.

        Returns:
            Number of bytes; 0 at the end of the connection.

        Raises:
            OSError: The connection broke, or nothing came in time.
        """
        try:
            return self._sock.recv_into(view, len(view), self._whole_pieces if whole else 0)
        except BlockingIOError as exc:  # from the kernel's timeout
            raise TimeoutError("timed out") from exc

    def begin_idling(self) -> None:
        """Remember since when it is idle."""
        self._idle_since = time.monotonic()

    def is_usable(self) -> bool:
        """Whether an idle connection still serves a request: the other side neither closed it nor sent anything."""
        if time.monotonic() - self._idle_since > _MAX_IDLE_SECONDS:
            return False
        sock = self._sock
        if isinstance(sock, (ssl.SSLSocket, NestedTls)) and sock.pending():
            return False
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if not poll.poll(0):
            return True
        return isinstance(sock, ssl.SSLSocket) and self._has_only_tls_messages(sock)

    def _has_only_tls_messages(self, sock: ssl.SSLSocket) -> bool:
        """Whether what arrived is of TLS itself, such as a session ticket."""
        self._wait_seconds = None
        sock.setblocking(False)
        try:
            sock.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Close it; called once or more often."""
        self._sock.close()


class ConnectionPool:
    """Sends requests on connections that it owns, and keeps those that can be used again. Thread-safe.

    Args:
        connect_timeout_seconds: How long each step to a connection may take: TCP (per address), tunnel, TLS.
        proxies: Which proxy leads where.
        ca_bundle: File with the authorities to trust; None for those of this system.
        tls_context: Returns the context of each TLS connection, instead of one with ``ca_bundle``.
        tls_name: The name that certificates of servers have to have; None for that in the request's origin.
    """

    def __init__(
        self,
        *,
        connect_timeout_seconds: float,
        proxies: Proxies | None = None,
        ca_bundle: str | None = None,
        tls_context: Callable[[], ssl.SSLContext] | None = None,
        tls_name: str | None = None,
    ) -> None:
        self.proxies = proxies or Proxies()
        self._connect_timeout_seconds = connect_timeout_seconds
        self._ca_bundle = ca_bundle
        self._sockets = OpenSockets()
        self._lock = threading.Lock()
        self._idle: defaultdict[Origin, list[Connection]] = defaultdict(list)
        self._tls_lock = threading.Lock()
        self._tls: ssl.SSLContext | None = None
        self._tls_of_caller = tls_context
        self._tls_name = tls_name

    @property
    def closed(self) -> bool:
        """``close`` was called."""
        return self._sockets.closed

    @property
    def open_connections(self) -> int:
        """Number of connections that are in use or idle."""
        return len(self._sockets)

    def send(self, request: Request, wait_seconds: Callable[[], float]) -> Answer:
        """Send ``request`` and read the head of its answer. No redirect is followed, and nothing is sent twice.

        Args:
            request: What to send.
            wait_seconds: How long to wait for the next bytes; called before each wait.

        Raises:
            OSError: No connection, a connection that broke, or an answer that is none.
        """
        connection = self._idle_connection(request.origin) or self._opened(request.origin)
        try:
            connection.wait_at_most(wait_seconds())
            connection.send(request)
            return Answer(
                connection,
                request.method,
                wait_seconds=wait_seconds,
                release=lambda: self._release(request.origin, connection),
            )
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """End what other threads wait for, and close what is idle; later requests fail."""
        self._sockets.shut_down()
        with self._lock:
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def _idle_connection(self, origin: Origin) -> Connection | None:
        while True:
            with self._lock:
                idle = self._idle[origin]
                if not idle:
                    return None
                connection = idle.pop()  # the one that was used last
            if connection.is_usable():
                return connection
            connection.close()

    def _release(self, origin: Origin, connection: Connection) -> None:
        connection.begin_idling()
        with self._lock:
            idle = self._idle[origin]
            if not self.closed and len(idle) < _MAX_IDLE_CONNECTIONS:
                idle.append(connection)
                return
        connection.close()

    # -- opening ------------------------------------------------------------------------------------------------------

    def _opened(self, origin: Origin) -> Connection:
        try:
            proxy = self.proxies.for_origin(origin)
        except ValueError as exc:
            raise ProxyError(str(exc)) from None
        try:
            if proxy is None:
                return self._direct(origin)
            return self._through(proxy, origin)
        except ConnectTimeoutError:
            raise
        except TimeoutError as exc:
            raise ConnectTimeoutError("timed out") from exc

    def _direct(self, origin: Origin) -> Connection:
        sock = self._connected(origin.host, origin.port)
        return Connection(self._encrypted(sock, origin.host) if origin.tls else sock)

    def _through(self, proxy: Proxy, origin: Origin) -> Connection:
        if proxy.scheme not in {"http", "https"}:
            message = f"{proxy} is neither an http:// nor an https:// proxy"
            raise ProxyError(message, status=400)
        try:
            sock = self._connected(proxy.host, proxy.port)
            if proxy.scheme == "https":
                sock = self._encrypted(sock, proxy.host)
        except OSError as exc:
            raise ProxyError(f"{proxy} cannot be reached ({_words(exc)})") from exc
        lines = f"Proxy-Authorization: {proxy.authorization}\r\n".encode("latin-1") if proxy.authorization else b""
        if not origin.tls:
            return Connection(sock, through_proxy=True, proxy_lines=lines)
        try:
            self._tunnel(sock, proxy, origin, lines)
        except BaseException:
            sock.close()
            raise
        return Connection(self._encrypted_in_tunnel(sock, origin.host))

    def _connected(self, host: str, port: int) -> socket.socket:
        """A TCP connection, to the first address of ``host`` that accepts one."""
        sock = socket.create_connection((host, port), self._connect_timeout_seconds)
        try:
            self._sockets.add(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except BaseException:
            sock.close()
            raise
        return sock

    def _tunnel(self, sock: socket.socket, proxy: Proxy, origin: Origin, lines: bytes) -> None:
        """Ask ``proxy`` for a tunnel to ``origin`` (RFC 9110 section 9.3.6)."""
        target = origin.host_and_port
        try:
            sock.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n".encode("latin-1") + lines + b"\r\n")
            deadline = time.monotonic() + self._connect_timeout_seconds

            def receive(view: memoryview) -> int:
                sock.settimeout(max(_MIN_WAIT_SECONDS, deadline - time.monotonic()))
                return sock.recv_into(view)

            head, rest = read_head(receive, deadline)
            sock.settimeout(self._connect_timeout_seconds)
        except (TimeoutError, ConnectionError) as exc:
            raise ProxyError(f"{proxy} did not answer ({_words(exc)})") from exc
        if not 200 <= head.status < 300:
            raise ProxyError(f"{proxy} answered HTTP {head.status} {head.reason}".rstrip(), head.status)
        if rest:  # the server behind the tunnel speaks second
            raise BadAnswerError("the proxy sent more than its answer")

    def _encrypted(self, sock: socket.socket, host: str) -> ssl.SSLSocket:
        """``sock`` with TLS; the certificate has to be for ``host``."""
        try:
            name = self._tls_name or host
            secure = self._tls_context().wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
        except BaseException:
            sock.close()
            raise
        return self._with_handshake(secure)

    def _encrypted_in_tunnel(self, sock: socket.socket, host: str) -> ssl.SSLSocket | NestedTls:
        if isinstance(sock, ssl.SSLSocket):
            return self._with_handshake(NestedTls(sock, self._tls_context(), host))
        return self._encrypted(sock, host)

    def _with_handshake(self, secure: _S) -> _S:
        try:
            self._sockets.add(secure)
            secure.do_handshake()
        except BaseException:
            secure.close()
            raise
        return secure

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls_of_caller is not None:
            return self._tls_of_caller()
        with self._tls_lock:
            if self._tls is None:
                try:
                    context = ssl.create_default_context(cafile=self._ca_bundle)
                except OSError as exc:  # ssl.SSLError is one
                    raise AuthoritiesError(f"{self._ca_bundle} cannot be used ({_words(exc)})") from exc
                # Python 3.13 turns this on, and private authorities often do not keep to every rule of RFC 5280.
                context.verify_flags &= ~ssl.VERIFY_X509_STRICT
                context.set_alpn_protocols(["http/1.1"])
                self._tls = context
            return self._tls


def _words(exc: OSError) -> str:
    return cast("str", exc.strerror) or type(exc).__name__
