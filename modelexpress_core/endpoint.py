"""Where a program connects: host, port, TLS and proxy."""

from __future__ import annotations

import ipaddress
import re

from attrs import frozen

from modelexpress_core.errors import InvalidURIError
from modelexpress_core.messages import without_credentials
from modelexpress_core.uri import host_and_port

__all__ = ["SERVER_PORT", "Endpoint"]

#: The port of a ModelExpress server, unless its address names another.
SERVER_PORT = 8001

_ADDRESS = re.compile(r"(?:(?P<scheme>https?)://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]@]+)(?::(?P<port>\d{1,5}))?/?")


@frozen
class Endpoint:
    """A TCP port, and how a client speaks to it.

    Attributes:
        host: Name or address, an IPv6 address without brackets.
        port: TCP port.
        tls: Whether the connection is encrypted.
        ca_bundle: File with the authorities that are trusted; None for those of the client's library.
        proxy: URL of the proxy that connections go through, without credentials; None for a direct connection.
        tls_name: The name that its certificate has to have; None for that of the host.
    """

    host: str
    port: int
    tls: bool = False
    ca_bundle: str | None = None
    proxy: str | None = None
    tls_name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """The server at ``host:port`` or ``http://host:port`` (plain), or ``https://host:port`` (TLS).

        The port is 8001 by default.

        Raises:
            InvalidURIError: It is none of these.
        """
        match = _ADDRESS.fullmatch(text.strip())
        port = SERVER_PORT if match is None else int(match["port"] or SERVER_PORT)
        if match is None or port > 65535:
            message = f"no address of a server: {without_credentials(text)!r}"
            raise InvalidURIError(message, hint="write host:port, http://host:port, or https://host:port for TLS")
        return cls(match["host"].strip("[]"), port, tls=match["scheme"] == "https")

    @property
    def is_loopback(self) -> bool:
        """Whether connections stay on this machine: the host is ``localhost`` or a loopback address."""
        if self.host.lower() == "localhost":
            return True
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback

    @property
    def target(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return host_and_port(self.host, self.port)

    def __str__(self) -> str:
        """As a URL."""
        return f"{'https' if self.tls else 'http'}://{self.target}"
