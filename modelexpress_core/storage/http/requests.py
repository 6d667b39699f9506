"""What a request says before it is sent, and the contract of the code that signs requests."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from attrs import field, frozen

from modelexpress_core.endpoint import Endpoint

__all__ = ["Origin", "Refusal", "Request", "Signer"]

#: RFC 9110 section 5.6.2.
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

#: RFC 9112 section 3.2: visible characters of ASCII; anything else has to be percent-encoded.
_TARGET = re.compile(r"/[!-~]*")

#: RFC 9110 section 5.5: neither a line break nor another control character, except the tab.
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")

_HOST = re.compile(r"[0-9A-Za-z._-]+|[0-9A-Fa-f:.]+(?:%[0-9A-Za-z._-]+)?")


@frozen
class Origin:
    """The server of a URL (RFC 9110 section 4.3.1).

    Attributes:
        host: Name or address, without brackets.
        port: TCP port.
        tls: Whether connections are encrypted.
    """

    host: str = field()
    port: int
    tls: bool

    @host.validator
    def _check_host(self, _attribute: Any, host: str) -> None:  # noqa: ANN401 - as attrs calls it
        if not _HOST.fullmatch(host):
            message = f"not a host: {host!r}"
            raise ValueError(message)

    @classmethod
    def of_url(cls, url: str) -> Origin:
        """The origin of an ``http`` or ``https`` URL.

        Raises:
            ValueError: The URL has another scheme, no host, user information, or characters that no URL has.
        """
        parts = urlsplit(url)
        # urlsplit drops line breaks and tabs, wherever they are.
        odd = any(character <= " " or character == "\x7f" for character in url)
        if odd or parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
            message = "expected an http or https URL, percent-encoded, with a host and without user information"
            raise ValueError(message)
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls)

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them: without the scheme's own port, an IPv6 address in brackets."""
        return self._host_in_url if self.port == (443 if self.tls else 80) else self.host_and_port

    @property
    def host_and_port(self) -> str:
        """Host and port, as CONNECT has them."""
        return f"{self._host_in_url}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether connections stay on this machine: the host is ``localhost`` or a loopback address."""
        return Endpoint(self.host, self.port).is_loopback

    @property
    def is_link_local(self) -> bool:
        """Whether no router passes connections on: this machine, or link-local as the instance metadata of clouds."""
        if self.is_loopback:
            return True
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_link_local
        except ValueError:
            return False

    @property
    def _host_in_url(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}"


def _header_lines(headers: Sequence[tuple[str, str]]) -> bytes:
    for name, value in headers:
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            message = f"a header that HTTP does not allow: {name!r}"  # its value may be a credential
            raise ValueError(message)
    return "".join(f"{name}: {value}\r\n" for name, value in headers).encode("latin-1")


@frozen
class Request:
    """A prepared request. Target, headers and content may hold credentials, so ``repr`` shows none of them.

    Attributes:
        method: Usually ``"GET"`` or ``"HEAD"``.
        origin: The server.
        target: Path and query, percent-encoded (RFC 9112 section 3.2.1).
        headers: Names and values; ``Host`` and ``Accept-Encoding: identity`` are added where they are missing.
        content: What follows the headers, which have its length.
        lines: The headers as they are sent.
    """

    method: str = field()
    origin: Origin
    target: str = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    content: bytes = field(default=b"", repr=False)
    lines: bytes = field(repr=False)

    @method.validator
    def _check_method(self, _attribute: Any, method: str) -> None:  # noqa: ANN401 - as attrs calls it
        if not _TOKEN.fullmatch(method):
            message = f"not a method: {method!r}"
            raise ValueError(message)

    @target.validator
    def _check_target(self, _attribute: Any, target: str) -> None:  # noqa: ANN401 - as attrs calls it
        if not _TARGET.fullmatch(target):
            message = "the path of the request has to start with a slash and be percent-encoded"
            raise ValueError(message)

    @lines.default
    def _encoded_headers(self) -> bytes:
        present = {name.lower() for name, _ in self.headers}
        defaults = {"Host": self.origin.authority, "Accept-Encoding": "identity"}
        added = tuple((name, value) for name, value in defaults.items() if name.lower() not in present)
        return _header_lines((*added, *self.headers))

    @classmethod
    def to_url(cls, method: str, url: str, headers: Sequence[tuple[str, str]] = (), content: bytes = b"") -> Request:
        """A request to an ``http`` or ``https`` URL, which is percent-encoded already.

        Raises:
            ValueError: The URL or a header is not allowed in HTTP.
        """
        parts = urlsplit(url)
        path = parts.path or "/"
        target = f"{path}?{parts.query}" if parts.query else path
        return cls(method, Origin.of_url(url), target, tuple(headers), content)

    def with_headers(self, headers: Mapping[str, str]) -> Request:
        """The same request with more headers."""
        added = tuple(headers.items())
        lines = self.lines + _header_lines(added)
        return Request(self.method, self.origin, self.target, self.headers + added, self.content, lines)

    def encoded(self, *, through_proxy: bool = False, proxy_lines: bytes = b"") -> bytes:
        """The request as it is sent: in absolute form to a proxy (RFC 9112 section 3.2.2).

        Args:
            through_proxy: A proxy reads this request.
            proxy_lines: Headers for that proxy.
        """
        target = f"{self.origin}{self.target}" if through_proxy else self.target
        first = f"{self.method} {target} HTTP/1.1\r\n".encode("latin-1")
        return first + self.lines + proxy_lines + b"\r\n" + self.content


@frozen
class Refusal:
    """An answer that does not hold what was asked for.

    Attributes:
        request: The request that was refused.
        status: HTTP status.
        reason: The server's reason phrase.
        headers: By lower-case name.
        content: The body, at most the first MiB; it may repeat credentials.
    """

    request: Request
    status: int
    reason: str
    headers: Mapping[str, str] = field(repr=False)
    content: bytes = field(repr=False)


class Signer(Protocol):
    """Prepares the requests of one storage: where an object is, and what proves that it may be read. Thread-safe.

    A redirect is an answer like any other: no header travels along it. A signer whose objects are on another host
    (a content delivery network) finds their URLs itself, and prepares requests for them without its token.
    """

    def request(self, path: str, headers: Mapping[str, str]) -> Request:
        """A GET for the object at ``path``. May be prepared once and used for many ranges.

        Args:
            path: As in ``ObjectInfo.path``.
            headers: What the request has to say: its range, and the version that is expected.
        """
        ...

    def renewed(self, path: str, headers: Mapping[str, str], refusals: Sequence[Refusal]) -> Request | None:
        """Another request for the same bytes, with other credentials or to another place; None where there is none.

        Args:
            path: As for ``request``.
            headers: As for ``request``.
            refusals: The answers to this read so far, the last one last.

        Raises:
            Exception: What the plugin's own error table explains better than the answer.
        """
        ...
