"""What storages that are reached over HTTP have in common: what answers mean, and how reads are ended from outside."""

from __future__ import annotations

import math
import socket
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    NotFoundError,
    SourceChangedError,
    ThrottledError,
    UnavailableError,
    UnsupportedError,
)

__all__ = ["OpenSockets", "http_error", "retry_after_seconds"]

_CHECK_URI = "check the URI"
_RELOAD = "start the load again when nothing writes to the model"
_WAIT = "try again later"

#: Status -> (class, likely cause, next step); those from 500 on are faults that may pass, others plain BackendErrors.
_STATUSES: Mapping[int, tuple[type[BackendError], str, str]] = {
    401: (AccessDeniedError, "credentials are missing, wrong or expired", "check the credentials"),
    403: (AccessDeniedError, "these credentials (or none) do not allow it", "check what they allow"),
    404: (NotFoundError, "the path is misspelt, or nothing was uploaded yet", _CHECK_URI),
    407: (AccessDeniedError, "the proxy wants credentials", "check the proxy's URL"),
    408: (DeadlineError, "the network or the server is overloaded", _WAIT),
    410: (NotFoundError, "it was taken away", _CHECK_URI),
    412: (SourceChangedError, "something replaced the object since the load began", _RELOAD),
    416: (SourceChangedError, "the object is shorter than when the load began", _RELOAD),
    429: (ThrottledError, "it is asked more than it serves at a time", f"{_WAIT}, or lower MX_CONCURRENCY"),
    501: (UnsupportedError, "it cannot do this", "check what the server is"),
    505: (UnsupportedError, "it speaks another version of HTTP", "check what the server is"),
}
_PASSING_FAULT = (UnavailableError, "the server has a passing fault", _WAIT)


class OpenSockets:
    """The sockets of one storage, so that closing it ends what other threads wait for. Thread-safe.

    Sockets need not be taken out again: those that nobody else holds any more are forgotten.

    Attributes:
        closed: ``shut_down`` was called.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[Any] = weakref.WeakSet()
        self.closed = False

    def add(self, sock: Any) -> None:  # noqa: ANN401 - a socket, or what wraps one
        """Know ``sock``, which has just been connected.

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
            # Not sock.shutdown: of a TLS socket that also takes the TLS layer away, and a thread that reads it would
            # take the encrypted bytes for the object's.
            with suppress(OSError):
                socket.socket.shutdown(getattr(sock, "socket", sock), socket.SHUT_RDWR)


def http_error(
    status: int, phrase: str | None, *, retry_after: str | None = None, uri: str, operation: str, provider: str
) -> BackendError:
    """The error for an answer (RFC 9110 section 15, RFC 6585): to be raised.

    Services that say more in the body of an answer, or use a status in their own way, need a table of their own.

    Args:
        status: Of the answer.
        phrase: The reason phrase, for people; never anything that may repeat credentials.
        retry_after: The header of that name, where there is one; what it says is waited for where trying again helps.
        uri: Redacted URI of the object.
        operation: What was tried, as a verb phrase.
        provider: Name of the plugin.
    """
    kind, cause, hint = _STATUSES.get(status, _PASSING_FAULT if status >= 500 else (BackendError, None, None))
    return kind(
        f"HTTP {status} {phrase or ''}".rstrip(),
        uri=uri,
        operation=operation,
        provider=provider,
        retry_after_seconds=retry_after_seconds(retry_after) if kind.default_retryable else None,
        cause=cause,
        hint=hint,
    )


def retry_after_seconds(header: str | None) -> float | None:
    """What a ``Retry-After`` header asks for (RFC 9110 section 10.2.3: seconds, or a date); None without one."""
    try:
        seconds = float(header or "")
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header or "") - datetime.now(timezone.utc)).total_seconds()
        except (TypeError, ValueError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
