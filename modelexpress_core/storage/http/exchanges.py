"""Small requests whose answers are read whole, within bounds of bytes and time: metadata, listings, tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlencode

from attrs import field, frozen

from modelexpress_core.storage.http.connections import ConnectionPool
from modelexpress_core.storage.http.failures import BadAnswerError, EncodedAnswerError
from modelexpress_core.storage.http.proxies import Proxies
from modelexpress_core.storage.http.ranges import check_encoding
from modelexpress_core.storage.http.requests import Origin, Refusal, Request

__all__ = ["BoundedSession", "WholeAnswer", "exchange", "request_of_sdk"]

#: What is read of an answer that refuses; its status says enough.
_MAX_REFUSAL_BYTES = 1 << 20

#: Credentials, tokens and keys take a few KiB.
_MAX_CREDENTIAL_BYTES = 1 << 20


@frozen
class WholeAnswer:
    """An answer with its content.

    Attributes:
        status: HTTP status.
        reason: The server's reason phrase.
        headers: By lower-case name.
        content: The whole content of a success; at most the first MiB of another answer.
    """

    status: int
    reason: str
    headers: Mapping[str, str] = field(repr=False)
    content: bytes = field(repr=False)

    @property
    def succeeded(self) -> bool:
        """Whether the status is one of success."""
        return 200 <= self.status < 300

    def as_refusal(self, request: Request) -> Refusal:
        """The answer as one that refuses ``request``."""
        return Refusal(request, self.status, self.reason, self.headers, self.content)


def exchange(
    pool: ConnectionPool,
    request: Request,
    *,
    read_timeout_seconds: float,
    max_bytes: int,
    ignored_encodings: Collection[str] | None = (),
) -> WholeAnswer:
    """Send ``request`` and read the whole answer.

    Args:
        pool: The connections.
        request: What to send.
        read_timeout_seconds: How long to wait for the head, and for the next bytes of the content.
        max_bytes: The longest content of a success.
        ignored_encodings: Codings that the service shows although the content is not encoded; None to accept all, for
            an answer that has no content.

    Raises:
        OSError: No connection, no whole answer, or a success that is longer or encoded. The content of another answer
            is cut, and left out where it is encoded: its status counts.
    """
    with pool.send(request, lambda: read_timeout_seconds) as answer:
        succeeded = 200 <= answer.status < 300
        try:
            if ignored_encodings is not None:
                check_encoding(answer.headers, ignored_encodings)
        except EncodedAnswerError:
            if succeeded:
                raise
            content = b""
        else:
            content = answer.read(max_bytes if succeeded else _MAX_REFUSAL_BYTES)
        if succeeded and not answer.ended:
            raise BadAnswerError(f"the answer has more than {max_bytes} bytes")
        return WholeAnswer(answer.status, answer.reason, answer.headers, content)


class BoundedSession:
    """Stands in for the HTTP session with which an SDK gets credentials. Thread-safe.

    The sessions of SDKs wait for each byte anew and read answers of any size. Here each request has a connection of its
    own, whose answer is bounded. Plain HTTP to this machine and to instance metadata goes through no proxy, which would
    see the credentials.

    Args:
        connect_timeout_seconds: How long each step to a connection may take.
        read_timeout_seconds: How long to wait for the next bytes, and for the whole head.
        proxies: Which proxy leads where; none if missing.
        ca_bundle: Returns the file with the authorities to trust; None for those of this system.
        metadata_hosts: Names of services of instance metadata, which are reached like link-local addresses.
    """

    def __init__(
        self,
        *,
        connect_timeout_seconds: float,
        read_timeout_seconds: float,
        proxies: Proxies | None = None,
        ca_bundle: Callable[[], str | None] = lambda: None,
        metadata_hosts: Collection[str] = (),
    ) -> None:
        self._connect_timeout_seconds = connect_timeout_seconds
        self._read_timeout_seconds = read_timeout_seconds
        self._proxies = proxies
        self._ca_bundle = ca_bundle
        self._metadata_hosts = metadata_hosts
        self._lock = threading.Lock()
        self._pools: set[ConnectionPool] = set()
        self._closed = False

    def send(
        self,
        request: Request,
        *,
        connect_timeout_seconds: float | None = None,
        read_timeout_seconds: float | None = None,
    ) -> WholeAnswer:
        """Return the answer to ``request``. Timeouts can be shortened, and not lengthened.

        Raises:
            OSError: As for ``exchange``.
        """
        pool = ConnectionPool(
            connect_timeout_seconds=_shortest(self._connect_timeout_seconds, connect_timeout_seconds),
            proxies=None if self.is_local(request.origin) else self._proxies,
            ca_bundle=self._ca_bundle() if request.origin.tls else None,
        )
        with self._lock:
            if self._closed:
                message = "the storage was closed"
                raise ConnectionAbortedError(message)
            self._pools.add(pool)
        try:
            with closing(pool):
                wait = _shortest(self._read_timeout_seconds, read_timeout_seconds)
                return exchange(pool, request, read_timeout_seconds=wait, max_bytes=_MAX_CREDENTIAL_BYTES)
        finally:
            with self._lock:
                self._pools.discard(pool)

    def is_local(self, origin: Origin) -> bool:
        """Whether plain HTTP to ``origin`` stays on this machine, or reaches its instance metadata."""
        return not origin.tls and (origin.is_link_local or origin.host in self._metadata_hosts)

    def close(self) -> None:
        """End what other threads wait for; later requests fail."""
        with self._lock:
            self._closed = True
            pools = list(self._pools)
        for pool in pools:
            pool.close()


def request_of_sdk(
    method: str,
    url: str,
    headers: Iterable[tuple[str, Any]],
    body: Any = None,  # noqa: ANN401 - each SDK has forms of its own
    *,
    left_out: Collection[str] = (),
) -> Request:
    """A request that an SDK describes, with the length of its content.

    Args:
        method: Of the request.
        url: Percent-encoded.
        headers: Names and values; a value may be text, bytes or anything with a text.
        body: Text, bytes, a file or the fields of a form; None for no content.
        left_out: Headers, in lower case, that belong to the SDK's own connections.

    Raises:
        ValueError: A part of it is not allowed in HTTP.
    """
    content = _content(body)
    dropped = {"content-length", *left_out}
    lines = [(name, _text(value)) for name, value in headers if name.lower() not in dropped]
    if content or method not in {"GET", "HEAD"}:
        lines.append(("Content-Length", str(len(content))))
    return Request.to_url(method, url, lines, content)


def _content(body: Any) -> bytes:  # noqa: ANN401 - see above
    if body is None:
        return b""
    if isinstance(body, Mapping):
        return urlencode(body).encode()
    if hasattr(body, "read"):
        body = body.read()
    return body.encode() if isinstance(body, str) else bytes(body)


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _shortest(longest: float, wanted: float | None) -> float:
    return longest if wanted is None else min(longest, wanted)
