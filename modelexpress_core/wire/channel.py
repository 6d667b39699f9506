"""Channels to a server, from the address that users write."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc
from attrs import frozen
from google.protobuf.message import Message

from modelexpress_core.errors import InvalidURIError, SettingsError
from modelexpress_core.wire.files import Files, read_bytes
from modelexpress_core.wire.rpc import MESSAGE_OPTIONS, Service, stub
from modelexpress_core.wire.settings import TlsSettings, TokenSettings
from modelexpress_core.wire.tls import ClientTls
from modelexpress_core.wire.tracing import traced

__all__ = ["Connection", "Endpoint", "TokenFile", "open_channel"]

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
            before, at, address = text.rpartition("@")
            shown = f"{'***' if before else ''}{at}{address}"  # what stands before it is a name and a password
            message = f"no address of a server: {shown!r}"
            raise InvalidURIError(message, hint="write host:port, http://host:port, or https://host:port for TLS")
        return cls(f"{match['host']}:{match['port'] or _DEFAULT_PORT}", match["scheme"] == "https")

    @property
    def host(self) -> str:
        """Without the brackets of an IPv6 address."""
        return self.target.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self.target.rpartition(":")[2])

    def __str__(self) -> str:
        """As a URL."""
        return f"{'https' if self.tls else 'http'}://{self.target}"


class Connection:
    """Calls of one server over a channel that is opened anew when certificates have changed. Thread-safe.

    Nothing is sent before the first call.

    Args:
        endpoint: The server.
        services: What is called.
        tls: Files of TLS, where the endpoint speaks it.
        token: Where the token is that is sent, if any.
        retries: Whether calls that find no server are made again, within their deadline.

    Raises:
        SettingsError: Files of TLS make no sense.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        services: Iterable[Service],
        *,
        tls: TlsSettings | None = None,
        token: TokenSettings | None = None,
        retries: bool = True,
    ) -> None:
        self.endpoint = endpoint
        self._services = tuple(services)
        self._retries = retries
        self._tls = ClientTls(tls or TlsSettings()) if endpoint.tls else None
        self._token = None if token is None else TokenFile(token.path)
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._closed = False
        self._stubs: Mapping[str, Mapping[str, Callable[..., Any]]] = {}

    def call(self, service: Service, method: str, request: Message, timeout_seconds: float) -> Any:  # noqa: ANN401 - the method's answer
        """The answer of ``method``: a message, or an iterator of them.

        Raises:
            grpc.RpcError: There is none.
            ValueError: The connection is closed.
            SettingsError: The token's file is there, and holds none.
        """
        token = None if self._token is None else self._token.token()
        metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        return self._stub(service)[method](request, timeout=timeout_seconds, metadata=metadata)

    def _stub(self, service: Service) -> Mapping[str, Callable[..., Any]]:
        with self._lock:
            if self._closed:
                reason = "the connection is closed"
                raise ValueError(reason)
            credentials, changed = (None, False) if self._tls is None else self._tls.credentials()
            if self._channel is None or changed:
                # The channel before is left to the calls that are under way on it.
                self._channel = open_channel(self.endpoint, credentials, retries=self._retries)
                self._stubs = {each.name: stub(each, self._channel) for each in self._services}
            return self._stubs[service.name]

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            self._closed = True
            if self._channel is not None:
                self._channel.close()


class TokenFile:
    """The token that is sent: what the file holds as of now; None where there is no such file.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._files: Files[str] | None = None

    def token(self) -> str | None:
        """The token.

        Raises:
            SettingsError: The file is there, and cannot be read or holds no token.
        """
        if not os.path.exists(self._path):
            self._files = None
            return None
        if self._files is None:
            self._files = Files((self._path,), self._read)
        return self._files.value()

    def _read(self) -> str:
        token = read_bytes(self._path, "MX_AUTH_TOKEN_PATH").strip()
        if not re.fullmatch(rb"[\x21-\x7e]+", token):
            message = f"the file that MX_AUTH_TOKEN_PATH names holds no token: {self._path}"
            raise SettingsError(message, hint="a token is one word, and all that stands in the file")
        return token.decode("ascii")


def open_channel(
    endpoint: Endpoint, credentials: grpc.ChannelCredentials | None = None, *, retries: bool = True
) -> grpc.Channel:
    """A channel to ``endpoint``; nothing is sent before the first call.

    Args:
        endpoint: The server.
        credentials: Of TLS, where the endpoint speaks it; by default what gRPC knows.
        retries: Whether calls that find no server are made again, within their deadline.
    """
    options = [*_OPTIONS, ("grpc.enable_retries", int(retries))]
    if endpoint.tls:
        # Channels with the same credentials would share a connection, also one that stands since before they changed.
        options.append(("grpc.use_local_subchannel_pool", 1))
        known = credentials or grpc.ssl_channel_credentials()
        return traced(grpc.secure_channel(endpoint.target, known, options=options))
    return traced(grpc.insecure_channel(endpoint.target, options=options))
