"""What goes wrong over HTTP, and what it means for a load: one table for answers, one for connections.

A plugin completes the first table with the statuses and error codes of its service, and the second with the names of
its settings.
"""

from __future__ import annotations

import math
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from attrs import frozen

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
from modelexpress_core.storage.http.requests import Refusal
from modelexpress_core.tls_errors import EXPLAINED_CODES, explain_verification_error
from modelexpress_core.uri import ModelURI

__all__ = [
    "AuthoritiesError",
    "BadAnswerError",
    "ConnectTimeoutError",
    "EncodedAnswerError",
    "ExceptionRow",
    "Failures",
    "Meaning",
    "ProxyError",
    "SettingNames",
    "connection_error",
    "first_row",
    "http_error",
    "meaning_of_answer",
    "retry_after_seconds",
    "with_causes",
]


# -- what the modules of this package raise ----------------------------------------------------------------------------


class AuthoritiesError(OSError):
    """The file with the certificate authorities cannot be used."""


class BadAnswerError(ConnectionError):
    """What the server sent is not a whole answer in HTTP/1.1, or exceeds a bound. The connection is closed."""


class ConnectTimeoutError(TimeoutError):
    """No connection came about in time: TCP, the tunnel of a proxy, or TLS."""


class EncodedAnswerError(OSError):
    """The content of an answer is encoded, although the request accepts no encoding: it holds other bytes.

    Args:
        encoding: What the answer says.
    """

    def __init__(self, encoding: str) -> None:
        super().__init__(f"the answer is encoded: {encoding[:40]}")


class ProxyError(OSError):
    """The proxy cannot be used, or does not connect to the server.

    Args:
        message: What happened; never the credentials in the proxy's URL.
        status: What the proxy answered to CONNECT; 0 where it answered nothing.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


# -- answers -----------------------------------------------------------------------------------------------------------


@frozen
class Meaning:
    """What an answer or an exception means.

    Attributes:
        error: The class of the error.
        cause: The likely cause.
        hint: The next step.
        retryable: Whether the same request may succeed later; None for what the class says.
    """

    error: type[BackendError]
    cause: str | None = None
    hint: str | None = None
    retryable: bool | None = None

    def described(
        self,
        reason: str,
        *,
        uri: str,
        operation: str,
        provider: str,
        hint: str | None = None,
        retry_after: str | None = None,
    ) -> BackendError:
        """The error, to be raised.

        Args:
            reason: What came back.
            uri: Redacted URI of the object.
            operation: What was tried, as a verb phrase.
            provider: Name of the plugin.
            hint: The next step, where more is known than the table says.
            retry_after: The header of that name; used where trying again can help.
        """
        return self.error(
            reason,
            uri=uri,
            operation=operation,
            provider=provider,
            retryable=self.retryable,
            retry_after_seconds=retry_after_seconds(retry_after) if self.error.default_retryable else None,
            cause=self.cause,
            hint=hint or self.hint,
        )


#: A line of a table of exceptions: the classes, what was seen, and what it means.
ExceptionRow = tuple[tuple[type[BaseException], ...], str, Meaning]


def first_row(
    table: Iterable[ExceptionRow], chain: Sequence[BaseException]
) -> tuple[BaseException, str, Meaning] | None:
    """The first line of ``table`` that fits an exception of ``chain``: that exception, what was seen, what it means."""
    for types, seen, meaning in table:
        for link in chain:
            if isinstance(link, types):
                return link, seen, meaning
    return None


def with_causes(exc: BaseException) -> tuple[BaseException, ...]:
    """``exc`` and its causes. Not its context: in a second try that may be the failure of the first."""
    links: list[BaseException] = []
    link: BaseException | None = exc
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__
    return tuple(links)


_CHECK_URI = "check the URI"
_CHECK_SERVER = "check what the server is"
_RELOAD = "start the load again when nothing writes to the model"
_WAIT = "try again later"

#: Status -> what it means; those from 500 on are passing faults, others say nothing more.
_STATUSES: Mapping[int, Meaning] = {
    401: Meaning(AccessDeniedError, "credentials are missing, wrong or expired", "check the credentials"),
    403: Meaning(AccessDeniedError, "these credentials (or none) do not allow it", "check what they allow"),
    404: Meaning(NotFoundError, "the path is misspelt, or the object is not there yet", _CHECK_URI),
    407: Meaning(AccessDeniedError, "the proxy asks for credentials", "check the proxy's URL"),
    408: Meaning(DeadlineError, "the network or the server is overloaded", _WAIT),
    410: Meaning(NotFoundError, "the object was removed", _CHECK_URI),
    412: Meaning(SourceChangedError, "something replaced the object since the load began", _RELOAD),
    416: Meaning(SourceChangedError, "the object is shorter than when the load began", _RELOAD),
    429: Meaning(ThrottledError, "it gets more requests than it serves at a time", f"{_WAIT}, or lower MX_CONCURRENCY"),
    501: Meaning(UnsupportedError, "the server cannot do this", _CHECK_SERVER),
    505: Meaning(UnsupportedError, "the server speaks another version of HTTP", _CHECK_SERVER),
}
_PASSING_FAULT = Meaning(UnavailableError, "the server has a passing fault", _WAIT)
_UNKNOWN = Meaning(BackendError)


def meaning_of_answer(status: int, code: str = "", own: Mapping[str | int, Meaning] | None = None) -> Meaning:
    """What an answer means: by its code, then by its status (RFC 9110 section 15, RFC 6585).

    Args:
        status: HTTP status.
        code: Error code of the service, from the body or a header; empty where there is none.
        own: The plugin's meanings of codes and statuses; they go before those of this module.
    """
    own = own or {}
    if code in own:
        return own[code]
    if status == 400 and code:  # with a code that is not in the table, the status says nothing more
        return _UNKNOWN
    passing_fault = own.get(500, _PASSING_FAULT) if status >= 500 else _UNKNOWN
    return own.get(status) or _STATUSES.get(status) or passing_fault


def http_error(
    status: int, phrase: str | None, *, retry_after: str | None = None, uri: str, operation: str, provider: str
) -> BackendError:
    """The error for an answer of which only the status is known: to be raised.

    Args:
        status: Of the answer.
        phrase: The reason phrase; never anything that may repeat credentials.
        retry_after: The header of that name, where there is one; used where trying again can help.
        uri: Redacted URI of the object.
        operation: What was tried, as a verb phrase.
        provider: Name of the plugin.
    """
    reason = f"HTTP {status} {phrase or ''}".rstrip()
    meaning = meaning_of_answer(status)
    return meaning.described(reason, uri=uri, operation=operation, provider=provider, retry_after=retry_after)


def retry_after_seconds(header: str | None) -> float | None:
    """The wait that a ``Retry-After`` header asks for (RFC 9110 section 10.2.3: seconds, a date); None without one."""
    try:
        seconds = float(header or "")
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header or "") - datetime.now(timezone.utc)).total_seconds()
        except (TypeError, ValueError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


# -- connections -------------------------------------------------------------------------------------------------------


@frozen
class SettingNames:
    """How the plugin's settings are called in hints.

    Attributes:
        endpoint: What says where the server is.
        ca_bundle: What names the file with trusted authorities.
        read_timeout: What limits the wait for the next bytes.
    """

    endpoint: str = "the URI"
    ca_bundle: str = "SSL_CERT_FILE"
    read_timeout: str = "MX_STALL_SECONDS"

    @property
    def wait(self) -> str:
        """What limits the wait of a read, which core may shorten."""
        return (
            self.read_timeout
            if self.read_timeout == "MX_STALL_SECONDS"
            else f"{self.read_timeout} (or MX_STALL_SECONDS)"
        )

    @property
    def check_server(self) -> str:
        """The next step where a server, or what is in front of it, does not do what it should."""
        return f"check {self.endpoint} and what is in front of it"


_CHECK_NETWORK = "check {names.endpoint}, firewalls, and HTTPS_PROXY and NO_PROXY"
_BROKE = Meaning(
    UnavailableError,
    "the server, a proxy or the network dropped the connection",
    "try again; if it stays, check that {names.endpoint} says http or https as the server does, and the network",
)
_DNS_FAULT = Meaning(UnavailableError, "the DNS of this machine does not answer", "check /etc/resolv.conf")

#: CONNECT was answered with a status: the class by that status, the rest by this.
_PROXY_DOWN = Meaning(UnavailableError, "the proxy is down, or its variable is wrong", "check HTTPS_PROXY and NO_PROXY")
_PROXY_CREDENTIALS = Meaning(
    AccessDeniedError, "the proxy asks for credentials, or refuses those in its URL", "check HTTPS_PROXY"
)
_PROXY_REFUSES = Meaning(
    UnavailableError,
    "it does not know the host, or may not connect to it",
    "check the proxy's rules, or add the host to NO_PROXY",
    retryable=False,
)

_ENCODED = Meaning(
    UnsupportedError,
    "the server, or a proxy before it, encodes by itself, or the object was stored with a Content-Encoding",
    "{names.check_server}, or upload the object again without Content-Encoding",
)

#: Exceptions before the answer -> what was seen, and what it means. The first line counts that fits the exception or
#: one of its causes.
_EXCEPTIONS: tuple[ExceptionRow, ...] = (
    (
        (socket.gaierror,),
        "the name of the endpoint {endpoint} does not resolve",
        Meaning(UnavailableError, "it is misspelt, or this machine has no DNS for it", "check {names.endpoint}", False),
    ),
    (
        (ssl.SSLCertVerificationError,),
        "the certificate of the endpoint {endpoint} is not trusted",
        Meaning(
            UnavailableError,
            "it was signed by an authority that this machine does not know",
            "set {names.ca_bundle} to a file with the certificate of that authority",
            False,
        ),
    ),
    ((ssl.SSLEOFError, ssl.SSLZeroReturnError), "the TLS connection to the endpoint {endpoint} broke", _BROKE),
    (
        (AuthoritiesError,),
        "no TLS connection to the endpoint {endpoint}",
        Meaning(
            UnavailableError,
            "the file with the trusted authorities is missing, or holds no certificates",
            "check {names.ca_bundle}",
            False,
        ),
    ),
    (
        (ssl.SSLError,),
        "no TLS connection to the endpoint {endpoint}",
        Meaning(
            UnavailableError,
            "it serves plain HTTP there, or wants another version of TLS",
            "check the scheme and port of {names.endpoint}",
            False,
        ),
    ),
    (
        (ConnectTimeoutError,),
        "no connection to the endpoint {endpoint} in time",
        Meaning(DeadlineError, "a firewall drops the packets, or the host is down", _CHECK_NETWORK),
    ),
    (
        (TimeoutError,),
        "the endpoint {endpoint} sent nothing {silence}",
        Meaning(
            DeadlineError,
            "the server or the network is overloaded, or the connection is dead",
            "try again later, or lower MX_CONCURRENCY; {names.wait} limits the wait",
        ),
    ),
    (
        (ConnectionRefusedError,),
        "the endpoint {endpoint} refused the connection",
        Meaning(UnavailableError, "no listener on that port, or not yet", "check {names.endpoint} and the server"),
    ),
    ((OSError,), "the connection to the endpoint {endpoint} broke", _BROKE),
)


def connection_error(
    exc: BaseException,
    *,
    uri: str,
    operation: str,
    provider: str,
    endpoint: str,
    names: SettingNames,
    silence_seconds: float | None = None,
) -> BackendError | None:
    """The error for an exception that came up before an answer or amid it; None where it is not of a connection.

    Args:
        exc: What was raised; its causes count too.
        uri: Redacted URI of the object.
        operation: What was tried, as a verb phrase.
        provider: Name of the plugin.
        endpoint: The server, as it may be shown.
        names: How the plugin's settings are called.
        silence_seconds: How long the next bytes were waited for.
    """
    about = {"uri": uri, "operation": operation, "provider": provider}
    chain = with_causes(exc)
    proxy = next((link for link in chain if isinstance(link, ProxyError)), None)
    if proxy is not None:
        return _of_proxy(proxy).described(f"no connection through the proxy: {proxy}", **about)
    encoded = next((link for link in chain if isinstance(link, EncodedAnswerError)), None)
    if encoded is not None:
        return _ENCODED.described(str(encoded), hint=(_ENCODED.hint or "").format(names=names), **about)
    row = first_row(_EXCEPTIONS, chain)
    if row is None:
        return None
    found, seen, meaning = row
    if isinstance(found, socket.gaierror) and found.errno == socket.EAI_AGAIN:
        meaning = _DNS_FAULT
    if isinstance(found, ssl.SSLCertVerificationError) and getattr(found, "verify_code", 0) in EXPLAINED_CODES:
        what, cause, hint = explain_verification_error(found)
        seen = f"the certificate of the endpoint {{endpoint}} {what}"
        meaning = Meaning(UnavailableError, cause, hint, retryable=False)
    silence = "in time" if silence_seconds is None else f"for {silence_seconds:.3g} s"
    reason = f"{seen.format(endpoint=endpoint, silence=silence)} [{_name(chain)}]"
    return meaning.described(reason, hint=(meaning.hint or "").format(names=names), **about)


def _of_proxy(exc: ProxyError) -> Meaning:
    if exc.status == 407:
        return _PROXY_CREDENTIALS
    return _PROXY_REFUSES if 300 <= exc.status < 500 else _PROXY_DOWN


def _name(chain: Iterable[BaseException]) -> str:
    """The innermost name of a failure, which says most; what a socket with a time-out raises inside says less."""
    names = [type(link).__name__ for link in chain if isinstance(link, OSError)]
    return next((name for name in reversed(names) if name != BlockingIOError.__name__), names[-1])


# -- one storage -------------------------------------------------------------------------------------------------------


class Failures:
    """Explains what goes wrong with one storage. A plugin overrides what its service says in its own way.

    Args:
        provider: Name of the plugin.
        uri: Any URI of the storage.
        endpoint: The server, as messages show it.
        names: How the plugin's settings are called in hints.
        closed: Whether the storage was closed.
    """

    #: What a read may raise besides errors of our own.
    caught: tuple[type[Exception], ...] = (OSError,)

    def __init__(
        self,
        provider: str,
        uri: ModelURI,
        *,
        endpoint: Callable[[], str],
        names: SettingNames,
        closed: Callable[[], bool],
    ) -> None:
        self._provider = provider
        self._uri = uri
        self._endpoint = endpoint
        self.names = names
        self._closed = closed

    def of_answer(self, refusal: Refusal, path: str, operation: str) -> BackendError:
        """The error for an answer that does not hold what was asked for: by its status.

        Services that say more in the body, or use a status in their own way, override it (see ``meaning_of_answer``).
        """
        return http_error(
            refusal.status,
            refusal.reason,
            retry_after=refusal.headers.get("retry-after"),
            uri=str(self._uri.with_path(path)),
            operation=operation,
            provider=self._provider,
        )

    def of_exception(
        self, exc: Exception, path: str, operation: str, silence_seconds: float | None = None
    ) -> BackendError:
        """The error for an exception; after ``close``, that the storage was closed."""
        if self._closed():
            return self.described(_UNKNOWN, "the storage was closed while this was under way", path, operation)
        return self.unanswered(exc, path, operation, silence_seconds)

    def unanswered(self, exc: Exception, path: str, operation: str, silence_seconds: float | None) -> BackendError:
        """The error for an exception of an open storage."""
        error = connection_error(
            exc,
            uri=str(self._uri.with_path(path)),
            operation=operation,
            provider=self._provider,
            endpoint=self._endpoint(),
            names=self.names,
            silence_seconds=silence_seconds,
        )
        return error or self.described(_UNKNOWN, f"{type(exc).__name__} was raised", path, operation)

    def described(
        self,
        meaning: Meaning,
        reason: str,
        path: str,
        operation: str,
        *,
        hint: str | None = None,
        retry_after: str | None = None,
    ) -> BackendError:
        """The error with this meaning for the object at ``path``; ``hint`` and ``retry_after`` as for ``Meaning``."""
        return meaning.described(
            reason,
            uri=str(self._uri.with_path(path)),
            operation=operation,
            provider=self._provider,
            hint=hint,
            retry_after=retry_after,
        )

    def check_open(self, path: str, operation: str) -> None:
        """Refuse to go on after ``close``."""
        if self._closed():
            raise self.described(_UNKNOWN, "the storage was closed", path, operation)
