"""The network between this machine and an endpoint of any storage: names, connections, TLS, clocks."""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from attrs import field, frozen

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import BackendError, DeadlineError, NotFoundError, UnavailableError, UnsupportedError
from modelexpress_core.probing import Fault, ProbeError, begin_tls, connect, look_up, reason_of_tls
from modelexpress_core.resources import start_thread
from modelexpress_core.tls_errors import explain_verification_error
from modelexpress_core.uri import host_and_port

__all__ = ["Certificate", "Handshake", "NetworkRoute", "call_with_deadline"]

_R = TypeVar("_R")

#: Addresses of a name that are tried at most.
_MAX_ADDRESSES = 8

#: Bytes of an answer that are read at most to find its date.
_MAX_ANSWER_BYTES = 16 << 10

_PROXY_PORTS: Mapping[str, int] = {"http": 80, "https": 443}

#: X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which Python has no name for.
_NO_CHECK_TIME = 0x200000

#: Likely cause and next step of a connection that does not come about.
_NO_CONNECTION: Mapping[Fault, tuple[str, str]] = {
    Fault.REFUSED: ("nothing listens on that port, or a firewall refuses it", "check host and port"),
    Fault.NO_NETWORK: ("this machine has no route to that network", "check its network, or set a proxy"),
    Fault.NO_HOST: ("the host is down, or there is no route to it", "check the host and the network between"),
    Fault.RESET: ("a firewall or the server breaks connections off", "check what is between, and the port"),
}


def call_with_deadline(seconds: float, call: Callable[[], _R], operation: str) -> _R:
    """What ``call`` returns.

    Raises:
        DeadlineError: It took longer than ``seconds``; its thread goes on then.
    """
    outcomes: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((True, call()))
        except BaseException as exc:  # noqa: BLE001 - raised to the caller
            outcomes.put((False, exc))

    start_thread(threading.Thread(target=run, name="mx-doctor", daemon=True), operation)
    try:
        done, outcome = outcomes.get(timeout=seconds)
    except Empty:
        reason = f"no answer within {seconds:g} s"
        raise DeadlineError(
            reason,
            operation=operation,
            cause="the other side, or something before it, has gone silent",
            hint="check that it is up, and what is between; give it more time with --timeout",
        ) from None
    if done:
        return outcome  # type: ignore[no-any-return]  # what call returned
    raise outcome


@frozen
class Certificate:
    """A server's certificate.

    Attributes:
        subject: Name of its subject.
        issuer: Name of the authority that signed it.
        names: Hosts and addresses that it is for.
        begins: First moment of its validity.
        ends: Last moment of its validity.
    """

    subject: str
    issuer: str
    names: tuple[str, ...]
    begins: datetime
    ends: datetime

    @classmethod
    def from_peer(cls, described: Mapping[str, Any]) -> Certificate:
        """From what ``SSLSocket.getpeercert`` returns."""
        return cls(
            subject=_distinguished(described.get("subject", ())),
            issuer=_distinguished(described.get("issuer", ())),
            names=tuple(name for _, name in described.get("subjectAltName", ())),
            begins=_moment(described["notBefore"]),
            ends=_moment(described["notAfter"]),
        )


def _distinguished(name: tuple[tuple[tuple[str, str], ...], ...]) -> str:
    return ", ".join(f"{key}={value}" for part in name for key, value in part)


def _moment(text: str) -> datetime:
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(text), tz=timezone.utc)


@frozen
class Handshake:
    """The result of a TLS handshake.

    Attributes:
        version: ``"TLSv1.3"``; empty if the handshake failed.
        certificate: The server's certificate; None if there is none.
        error: Why the server is not trusted or does not speak TLS; None if the handshake succeeded.
    """

    version: str = ""
    certificate: Certificate | None = None
    error: BackendError | None = None


@frozen
class NetworkRoute:
    """The way to an endpoint, direct or through a proxy.

    Attributes:
        endpoint: The endpoint.
        timeout_seconds: Time-out of each wait.
        host: The host to connect to: the endpoint's, or the proxy's.
        port: Its TCP port.
    """

    endpoint: Endpoint
    timeout_seconds: float
    host: str = field(init=False)
    port: int = field(init=False)

    @host.default
    def _host_of(self) -> str:
        return self.endpoint.host if self._proxy is None else self._proxy.hostname or ""

    @port.default
    def _port_of(self) -> int:
        if self._proxy is None:
            return self.endpoint.port
        return self._proxy.port or _PROXY_PORTS.get(self._proxy.scheme, 1080)

    @property
    def _proxy(self) -> Any:  # noqa: ANN401 - a split URL, for which typing has no short name
        return None if self.endpoint.proxy is None else urlsplit(self.endpoint.proxy)

    @property
    def is_address(self) -> bool:
        """Whether the host is an address, which needs no look-up."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    def addresses(self) -> tuple[str, ...]:
        """The addresses of the host.

        Raises:
            NotFoundError: It has none.
            UnavailableError: The name servers do not say.
        """
        operation = f"look up {self.host}"
        try:
            return call_with_deadline(self.timeout_seconds, lambda: look_up(self.host, self.port), operation)
        except ProbeError as exc:
            if exc.fault is Fault.NO_NAME_SERVER:
                raise UnavailableError(
                    "no name server answers",
                    operation=operation,
                    cause="the network is down, or /etc/resolv.conf names servers that cannot be reached",
                    hint="check the network of this machine",
                ) from exc
            raise NotFoundError(
                "no such name",
                operation=operation,
                cause="it is misspelt, or known only in another network",
                hint="check the name; within a cluster or a company also the name server and the proxy",
            ) from exc

    def connect(self, addresses: tuple[str, ...]) -> dict[str, float | ProbeError]:
        """Milliseconds that a connection to each address took, or why there is none; all are tried at once."""
        tried = addresses[:_MAX_ADDRESSES]
        with ThreadPoolExecutor(len(tried), thread_name_prefix="mx-doctor") as pool:
            return dict(zip(tried, pool.map(self._time_connection, tried), strict=True))

    def _time_connection(self, address: str) -> float | ProbeError:
        begun = time.monotonic()
        try:
            connect(address, self.port, self.timeout_seconds).close()
        except ProbeError as exc:
            return exc
        return (time.monotonic() - begun) * 1000

    def connect_error(self, outcomes: Mapping[str, float | ProbeError]) -> BackendError:
        """The error if no address could be connected to."""
        errors = [exc for exc in outcomes.values() if isinstance(exc, ProbeError)]
        # A machine without IPv6 has no route to such an address; the reason is what the other addresses say.
        first = min(errors, key=lambda exc: exc.fault is Fault.NO_NETWORK)
        proxy = "the proxy " if self._proxy is not None else ""
        operation = f"connect to {proxy}{', '.join(host_and_port(address, self.port) for address in outcomes)}"
        if first.fault is Fault.SILENT:
            return DeadlineError(
                f"no answer within {self.timeout_seconds:g} s",
                operation=operation,
                cause="a firewall drops the packets, or the host is down",
                hint="check host, port and firewall; give it more time with --timeout",
            )
        cause, hint = _NO_CONNECTION.get(first.fault, (None, "check host and port"))
        message = getattr(first.cause, "strerror", None) or str(first)
        return UnavailableError(message, operation=operation, cause=cause, hint=hint)

    # -- TLS ----------------------------------------------------------------------------------------------------------

    def handshake(self, address: str) -> Handshake:
        """Shake hands, and verify the certificate with the endpoint's authorities, or those of this system."""
        try:
            context = ssl.create_default_context(cafile=self.endpoint.ca_bundle)
        except (OSError, ssl.SSLError) as exc:
            missing = isinstance(exc, FileNotFoundError)
            reason = "there is no such file" if missing else f"it holds no certificates: {reason_of_tls(exc)}"
            error = UnavailableError(
                reason,
                operation=f"read the authorities in {self.endpoint.ca_bundle}",
                retryable=False,
            )
            return Handshake(error=error)
        try:
            with closing(self.open(address)) as sock, self._begin_tls(context, sock) as secure:
                return Handshake(secure.version() or "", Certificate.from_peer(secure.getpeercert() or {}))
        except ProbeError as exc:
            if isinstance(exc.cause, ssl.SSLCertVerificationError):
                version, certificate = self._unverified(address)
                return Handshake(version, certificate, self._untrusted(exc.cause))
            return Handshake(error=self._tls_error(exc))
        except OSError as exc:
            fault = Fault.SILENT if isinstance(exc, TimeoutError) else Fault.OTHER
            return Handshake(error=self._tls_error(ProbeError(fault, exc)))

    def _begin_tls(self, context: ssl.SSLContext, sock: socket.socket) -> ssl.SSLSocket:
        return begin_tls(sock, context, self.endpoint.tls_name or self.endpoint.host)

    def _unverified(self, address: str) -> tuple[str, Certificate | None]:
        """Version and certificate of a server that is not trusted.

        Python describes verified certificates only. So the certificate is made its own authority, whatever its dates.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        version = ""
        try:
            with closing(self.open(address)) as sock, self._begin_tls(context, sock) as secure:
                version = secure.version() or ""
                own = secure.getpeercert(binary_form=True)
            context.load_verify_locations(cadata=own)
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME)
            with closing(self.open(address)) as sock, self._begin_tls(context, sock) as secure:
                return version, Certificate.from_peer(secure.getpeercert() or {})
        except (ProbeError, OSError, BackendError, KeyError, ValueError):
            return version, None

    def _untrusted(self, exc: ssl.SSLCertVerificationError) -> BackendError:
        what, cause, hint = explain_verification_error(exc)
        return UnavailableError(
            f"its certificate {what}: {exc.verify_message}",
            operation=f"verify {self.endpoint.host}",
            retryable=False,
            cause=cause,
            hint=hint,
        )

    def _tls_error(self, exc: ProbeError) -> BackendError:
        operation = f"begin TLS with {host_and_port(self.endpoint.host, self.endpoint.port)}"
        if exc.fault is Fault.SILENT:
            return DeadlineError(
                f"no answer within {self.timeout_seconds:g} s",
                operation=operation,
                cause="what listens there does not speak TLS, or a firewall swallows it",
                hint="check the port, and that it is one for encrypted connections",
            )
        if exc.fault is Fault.PLAIN:
            cause, hint = "the port serves connections that are not encrypted", "write http:// in place of https://"
        else:
            cause, hint = (
                "the server wants another version of TLS, does not know the host's name, or is something else",
                "check host and port, and what is between",
            )
        return UnavailableError(reason_of_tls(exc.cause), operation=operation, retryable=False, cause=cause, hint=hint)

    # -- open connections ---------------------------------------------------------------------------------------------

    def open(self, address: str) -> socket.socket:
        """A connection to the endpoint over ``address``, which may be its proxy's; not encrypted yet.

        Raises:
            ProbeError: There is none.
            UnavailableError: The proxy does not connect to the endpoint.
            UnsupportedError: The proxy is of a kind that cannot be probed.
        """
        if self._proxy is not None and self._proxy.scheme != "http":
            reason = f"it goes through a proxy that speaks {self._proxy.scheme}, which cannot be probed"
            raise UnsupportedError(reason)
        sock = connect(address, self.port, self.timeout_seconds)
        if self._proxy is None:
            return sock
        try:
            self._tunnel(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def _tunnel(self, sock: socket.socket) -> None:
        target = host_and_port(self.endpoint.host, self.endpoint.port)
        sock.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode("latin-1"))
        head = _answer_head(sock)
        match = re.match(rb"HTTP/1\.[01] (\d{3})([^\r\n]*)", head)
        status = int(match[1]) if match else 0
        if 200 <= status < 300:
            return
        operation = f"connect to {target} through the proxy"
        if status == 407:
            reason = "the proxy asks for a name and a password, which only the storage has"
            raise UnsupportedError(reason, operation=operation)
        said = f"{status}{match[2].decode('latin-1')}" if match else "no answer in HTTP"
        raise UnavailableError(
            f"the proxy says {said}",
            operation=operation,
            retryable=False,
            cause="it does not know the host, or may not connect to it",
            hint="check the proxy's rules, or take the host out of the proxy's variables (NO_PROXY)",
        )

    def server_time(self, address: str) -> tuple[datetime, datetime] | None:
        """The time there and here, from the answer to an HTTP request; None if the answer has no date."""
        target = self.endpoint.host if ":" not in self.endpoint.host else f"[{self.endpoint.host}]"
        request = f"HEAD / HTTP/1.1\r\nHost: {target}:{self.endpoint.port}\r\nConnection: close\r\n\r\n"
        try:
            with closing(self.open(address)) as sock:
                if self.endpoint.tls:
                    context = ssl.create_default_context(cafile=self.endpoint.ca_bundle)
                    with self._begin_tls(context, sock) as secure:
                        return _ask_time(secure, request)
                return _ask_time(sock, request)
        except (ProbeError, OSError, BackendError, ValueError):
            return None


def _ask_time(sock: socket.socket, request: str) -> tuple[datetime, datetime] | None:
    begun = datetime.now(timezone.utc)
    sock.sendall(request.encode("latin-1"))
    head = _answer_head(sock)
    here = begun + (datetime.now(timezone.utc) - begun) / 2
    match = re.search(rb"\r\nDate:[ \t]*([^\r\n]+)\r\n", head, re.IGNORECASE)
    if not head.startswith(b"HTTP/") or match is None:
        return None
    there = parsedate_to_datetime(match[1].decode("latin-1"))
    # The date is rounded down to a whole second.
    return there.replace(tzinfo=there.tzinfo or timezone.utc) + timedelta(seconds=0.5), here


def _answer_head(sock: socket.socket) -> bytes:
    """The head of an HTTP answer, up to the empty line; less if the answer ends before."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_ANSWER_BYTES:
        # Byte by byte: what follows the head of a tunnel's answer comes from the endpoint.
        part = sock.recv(1)
        if not part:
            break
        head += part
    return head
