"""Which HTTP proxy leads to a server, by the variables that all tools share (HTTPS_PROXY, NO_PROXY and others)."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from attrs import field, frozen

from modelexpress_core.storage.http.requests import Origin

__all__ = ["Proxies", "Proxy"]

_NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@frozen
class Proxy:
    """An HTTP proxy.

    Attributes:
        scheme: How the proxy itself is spoken to: ``"http"`` or ``"https"``; connections can use no other.
        host: Name or address.
        port: TCP port.
        authorization: Value of the Proxy-Authorization header; empty for none. Never shown.
    """

    scheme: str
    host: str
    port: int
    authorization: str = field(default="", repr=False)

    @classmethod
    def of_url(cls, url: str) -> Proxy:
        """The proxy of ``http://user:password@host:port``; scheme, user and port may be missing.

        Raises:
            ValueError: The URL has no host, or a port that is no number. The message does not repeat the URL.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url.removeprefix('//')}")
            scheme, host, port = parts.scheme, parts.hostname, parts.port
        except ValueError:
            scheme, host, port = "", None, None
        if not host:
            message = "the URL of the proxy has no host, or a port that is no number"
            raise ValueError(message)
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        credentials = f"{unquote(user)}:{unquote(password)}"
        authorization = f"Basic {base64.b64encode(credentials.encode()).decode()}" if user or password else ""
        return cls(scheme, host, port or (443 if scheme == "https" else 80), authorization)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


@frozen
class Proxies:
    """The proxies that an environment names.

    Attributes:
        by_scheme: URL of the proxy for ``"http"``, ``"https"`` and ``"all"`` URLs. May hold a password; never shown.
        exceptions: Hosts that are reached directly, as NO_PROXY lists them.
    """

    by_scheme: Mapping[str, str] = field(factory=dict, repr=False)
    exceptions: tuple[str, ...] = ()

    @classmethod
    def from_environ(cls, *environs: Mapping[str, str]) -> Proxies:
        """The proxies that the variables name, in either case; lower case goes first, and the first environment does.

        HTTP_PROXY in capitals is passed over in a CGI program, where a client's header can set it (httpoxy).
        """
        found: dict[str, str] = {}
        for environ in environs:
            for name in _NAMES:
                capitals = "" if name == "http_proxy" and "REQUEST_METHOD" in environ else name.upper()
                value = environ.get(name, environ.get(capitals))
                if value is not None:
                    found.setdefault(name, value.strip())
        by_scheme = {
            scheme: found[f"{scheme}_proxy"] for scheme in ("http", "https", "all") if f"{scheme}_proxy" in found
        }
        exceptions = tuple(part.strip().lower() for part in found.get("no_proxy", "").split(",") if part.strip())
        return cls(by_scheme, exceptions)

    def for_origin(self, origin: Origin) -> Proxy | None:
        """The proxy that leads to ``origin``; None for a direct connection.

        Raises:
            ValueError: The URL of the proxy cannot be used.
        """
        scheme = "https" if origin.tls else "http"
        url = self.by_scheme.get(scheme, self.by_scheme.get("all"))
        if not url or any(_matches(exception, origin) for exception in self.exceptions):
            return None
        return Proxy.of_url(url)


def _matches(exception: str, origin: Origin) -> bool:
    """Whether an entry of NO_PROXY means ``origin``.

    An entry is ``*``, a domain (with or without a leading dot, meaning its subdomains too), an address or a network
    (``10.0.0.0/8``), each but the last with a port or without.
    """
    if exception == "*":
        return True
    host, port = _host_and_port(exception)
    if port is not None and port != origin.port:
        return False
    address = _address(origin.host)
    if address is not None:
        try:
            return address in ipaddress.ip_network(host, strict=False)
        except ValueError:
            return False
    domain = host.removeprefix("*").strip(".")
    name = origin.host.lower().rstrip(".")
    return bool(domain) and (name == domain or name.endswith(f".{domain}"))


def _host_and_port(exception: str) -> tuple[str, int | None]:
    if exception.startswith("["):
        host, _, rest = exception[1:].partition("]")
        port = rest.removeprefix(":")
    elif exception.count(":") == 1:
        host, _, port = exception.partition(":")
    else:
        host, port = exception, ""
    return host, int(port) if port.isdecimal() else None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
