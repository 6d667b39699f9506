"""Channels to a server, from the address that users write."""

from __future__ import annotations

import json
import re

import grpc
from attrs import frozen

from modelexpress_core.errors import InvalidURIError
from modelexpress_core.wire.rpc import MESSAGE_OPTIONS

__all__ = ["Endpoint", "open_channel"]

_DEFAULT_PORT = 8001

_ADDRESS = re.compile(r"(?:(?P<scheme>https?)://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]@]+)(?::(?P<port>\d{1,5}))?/?")

#: Every call may be made twice: what it does once more changes nothing.
_RETRIES = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}

_OPTIONS = (
    *MESSAGE_OPTIONS,
    ("grpc.service_config", json.dumps(_RETRIES)),
    # A server that was away is found again within seconds of its return, however long that took. gRPC itself would try
    # every two minutes in the end.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5000),  # how long one try may take
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@frozen
class Endpoint:
    """Where a server is.

    Attributes:
        target: ``host:port``.
        tls: Whether it is spoken to in TLS.
    """

    target: str
    tls: bool = False

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """``host:port`` or ``http://host:port`` (plain), or ``https://host:port`` (TLS); the port is 8001 by default.

        Raises:
            InvalidURIError: It is none of these.
        """
        match = _ADDRESS.fullmatch(text.strip())
        if match is None or int(match["port"] or _DEFAULT_PORT) > 65535:
            message = f"no address of a server: {text!r}"
            raise InvalidURIError(message, hint="write host:port, http://host:port, or https://host:port for TLS")
        return cls(f"{match['host']}:{match['port'] or _DEFAULT_PORT}", match["scheme"] == "https")

    def __str__(self) -> str:
        """As a URL."""
        return f"{'https' if self.tls else 'http'}://{self.target}"


def open_channel(endpoint: Endpoint) -> grpc.Channel:
    """A channel to ``endpoint``; nothing is sent before the first call. Calls that find no server are made again."""
    if endpoint.tls:
        return grpc.secure_channel(endpoint.target, grpc.ssl_channel_credentials(), options=_OPTIONS)
    return grpc.insecure_channel(endpoint.target, options=_OPTIONS)
