"""A prober of TCP and TLS: it looks names up, connects, shakes hands, and classifies what goes wrong.

It has no words for users: what a fault means, and the next step, differs between a storage and a ModelExpress server.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Mapping
from enum import Enum, auto

__all__ = ["Fault", "ProbeError", "begin_tls", "connect", "look_up", "reason_of_tls"]


class Fault(Enum):
    """What goes wrong on the way to a server."""

    NO_NAME_SERVER = auto()  # no name server answers
    UNKNOWN_NAME = auto()
    REFUSED = auto()  # no listener, or a firewall that says so
    NO_NETWORK = auto()  # this machine has no route to the network
    NO_HOST = auto()  # no route to the host
    RESET = auto()  # the other side, or something between, ends the connection
    SILENT = auto()  # no answer in time
    UNTRUSTED = auto()  # the certificate does not verify: an ``ssl.SSLCertVerificationError`` is the cause
    PLAIN = auto()  # the answer to the handshake is not encrypted
    ALERT = auto()  # the other side refuses the handshake
    OTHER = auto()


class ProbeError(Exception):
    """A step to a server failed.

    Args:
        fault: What went wrong.
        cause: The error of the system or of OpenSSL.
    """

    def __init__(self, fault: Fault, cause: OSError | UnicodeError) -> None:
        super().__init__(str(cause))
        self.fault = fault
        self.cause = cause


_CONNECT_FAULTS: Mapping[int, Fault] = {
    errno.ECONNREFUSED: Fault.REFUSED,
    errno.ENETUNREACH: Fault.NO_NETWORK,
    errno.EADDRNOTAVAIL: Fault.NO_NETWORK,  # the machine has no address of that family
    errno.EHOSTUNREACH: Fault.NO_HOST,
    errno.ECONNRESET: Fault.RESET,
}

#: How OpenSSL names an answer that is no TLS; which one depends on its version and on the first bytes.
_PLAIN_REASONS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"})


def look_up(host: str, port: int) -> tuple[str, ...]:
    """The addresses of ``host``, each once.

    Raises:
        ProbeError: It has none, or no name server answers.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise ProbeError(_name_fault(exc), exc) from exc
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def connect(host: str, port: int, timeout_seconds: float) -> socket.socket:
    """A connection to ``host``, a name or an address; ``timeout_seconds`` is also its time-out.

    Raises:
        ProbeError: There is none.
    """
    try:
        return socket.create_connection((host, port), timeout_seconds)
    except (socket.gaierror, UnicodeError) as exc:
        raise ProbeError(_name_fault(exc), exc) from exc
    except TimeoutError as exc:
        raise ProbeError(Fault.SILENT, exc) from exc
    except OSError as exc:
        raise ProbeError(_CONNECT_FAULTS.get(exc.errno or 0, Fault.OTHER), exc) from exc


def begin_tls(sock: socket.socket, context: ssl.SSLContext, server_name: str) -> ssl.SSLSocket:
    """TLS over ``sock``, which is closed where the handshake fails.

    Raises:
        ProbeError: The handshake fails.
    """
    try:
        return context.wrap_socket(sock, server_hostname=server_name)
    except OSError as exc:  # of which OpenSSL's errors are
        raise ProbeError(_tls_fault(exc), exc) from exc


def reason_of_tls(exc: OSError | UnicodeError) -> str:
    """What OpenSSL or the system calls an error, in a few words."""
    reason = getattr(exc, "reason", "")
    if isinstance(reason, str) and reason:
        return reason.lower().replace("_", " ")
    return getattr(exc, "strerror", None) or os.strerror(getattr(exc, "errno", None) or errno.EIO)


def _name_fault(exc: OSError | UnicodeError) -> Fault:
    again = isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_AGAIN
    return Fault.NO_NAME_SERVER if again else Fault.UNKNOWN_NAME


def _tls_fault(exc: OSError) -> Fault:
    if isinstance(exc, TimeoutError):
        return Fault.SILENT
    if isinstance(exc, ssl.SSLCertVerificationError):
        return Fault.UNTRUSTED
    if isinstance(exc, (ssl.SSLEOFError, ConnectionError)):
        return Fault.RESET
    if not isinstance(exc, ssl.SSLError):
        return Fault.OTHER
    reason = exc.reason or str(exc)
    if "ALERT" in reason.upper():
        return Fault.ALERT
    return Fault.PLAIN if reason in _PLAIN_REASONS else Fault.OTHER
