"""Channels to a server: options, credentials, tokens, and calls of every kind."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import SettingsError
from modelexpress_core.wire.files import WatchedFiles, read_bytes
from modelexpress_core.wire.rpc import MESSAGE_OPTIONS, Service, stub
from modelexpress_core.wire.settings import TlsSettings, TokenSettings
from modelexpress_core.wire.tls import ClientTls
from modelexpress_core.wire.tracing import with_trace_context

__all__ = ["Connection", "TokenFile", "open_channel"]

_log = logging.getLogger(__name__)

#: Every call may be repeated: the repetition changes nothing. gRPC repeats none that has got a response.
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
    # A server that returns is found within seconds. By default gRPC would try every two minutes in the end.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5000),  # the time-out of one try
    ("grpc.max_reconnect_backoff_ms", 1000),
)


_MOST_ANSWER_BYTES = "grpc.max_receive_message_length"


class Connection:
    """A channel to one server, which is opened again when certificates have changed. Thread-safe.

    Nothing is sent before the first call.

    Args:
        endpoint: The server.
        services: The services that are called.
        tls: Files of TLS, for an endpoint that speaks it.
        token: The file with the token that is sent; None to send none. It goes over TLS, which verifies the name of the
            server, or over loopback; beyond these only if its settings say so.
        retries: Whether calls that find no server are repeated, within their deadline.
        most_answer_bytes: Longest answer that is taken; by default 100 MiB.

    Attributes:
        closed: Whether ``close`` was called.

    Raises:
        SettingsError: A file of TLS cannot be used.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        services: Iterable[Service],
        *,
        tls: TlsSettings | None = None,
        token: TokenSettings | None = None,
        retries: bool = True,
        most_answer_bytes: int | None = None,
    ) -> None:
        self._most_answer_bytes = most_answer_bytes
        self.endpoint = endpoint
        self._services = tuple(services)
        self._retries = retries
        self._tls = ClientTls(tls or TlsSettings()) if endpoint.tls else None
        self._token = None if token is None else TokenFile(token.path)
        self._sends_token = endpoint.tls or endpoint.is_loopback or (token is not None and token.plaintext)
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self.closed = False
        self._stubs: Mapping[str, Mapping[str, Callable[..., Any]]] = {}

    @property
    def withholds_token(self) -> bool:
        """Whether there is a token that is not sent, because others on the network could read it."""
        return not self._sends_token and self._token is not None and self._token.exists

    def call(
        self,
        service: Service,
        method: str,
        request: Any,  # noqa: ANN401 - of gRPC
        timeout_seconds: float | None,
        credential: str | None = None,
    ) -> Any:  # noqa: ANN401 - of gRPC
        """Begin a call of ``method``.

        Args:
            service: The service.
            method: The method.
            request: The request, or an iterator of requests where they are a stream.
            timeout_seconds: Time-out of the whole call, streams included; None for none.
            credential: A credential for this call, in place of the token.

        Returns:
            The response, or gRPC's iterator of responses where they are a stream.

        Raises:
            grpc.RpcError: The call failed. Iterators raise it, too.
            ValueError: The connection is closed.
            SettingsError: The token's file exists, and has no token in it.
        """
        token = credential
        if token is None and self._token is not None and self._sends_token:
            token = self._token.token()
            if token is not None and not (self.endpoint.tls or self.endpoint.is_loopback):
                _warn_of_plaintext(str(self.endpoint))
        metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        return self._stub(service)[method](request, timeout=timeout_seconds, metadata=metadata)

    def _stub(self, service: Service) -> Mapping[str, Callable[..., Any]]:
        with self._lock:
            if self.closed:
                reason = "the connection is closed"
                raise ValueError(reason)
            credentials, changed = (None, False) if self._tls is None else self._tls.credentials()
            if self._channel is None or changed:
                # Calls in flight keep the former channel.
                self._channel = open_channel(
                    self.endpoint, credentials, retries=self._retries, most_answer_bytes=self._most_answer_bytes
                )
                self._stubs = {each.name: stub(each, self._channel) for each in self._services}
            return self._stubs[service.name]

    def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        with self._lock:
            self.closed = True
            if self._channel is not None:
                self._channel.close()


@functools.cache  # one warning for each server
def _warn_of_plaintext(server: str) -> None:
    _log.warning(
        "the token is sent to %s without TLS, since MX_AUTH_TOKEN_PLAINTEXT is set: others on the network can read it",
        server,
    )


class TokenFile:
    """The token of a file, which is read again when it has changed.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._files: WatchedFiles[str] | None = None

    @property
    def exists(self) -> bool:
        """Whether there is a token."""
        return os.path.exists(self._path)

    def token(self) -> str | None:
        """The present token; None if there is no such file.

        Raises:
            SettingsError: The file exists, and cannot be read or has no token in it.
        """
        if not self.exists:
            self._files = None
            return None
        if self._files is None:
            self._files = WatchedFiles((self._path,), self._read)
        return self._files.value()

    def _read(self) -> str:
        token = read_bytes(self._path, "MX_AUTH_TOKEN_PATH").strip()
        if not re.fullmatch(rb"[\x21-\x7e]+", token):
            message = f"the file that MX_AUTH_TOKEN_PATH names holds no token: {self._path}"
            raise SettingsError(message, hint="the file must hold the token, one word, and nothing else")
        return token.decode("ascii")


def open_channel(
    endpoint: Endpoint,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    retries: bool = True,
    most_answer_bytes: int | None = None,
) -> grpc.Channel:
    """A channel to ``endpoint``; nothing is sent before the first call.

    Args:
        endpoint: The server.
        credentials: Credentials for TLS, if the endpoint speaks it; by default gRPC's own.
        retries: Whether calls that find no server are repeated, within their deadline.
        most_answer_bytes: Longest answer that is taken; by default 100 MiB.
    """
    options = [*_OPTIONS, ("grpc.enable_retries", int(retries))]
    if most_answer_bytes is not None:
        options = [each for each in options if each[0] != _MOST_ANSWER_BYTES]
        options.append((_MOST_ANSWER_BYTES, most_answer_bytes))
    if endpoint.is_loopback:  # a proxy would be another host
        options.append(("grpc.enable_http_proxy", 0))
    if endpoint.tls:
        # Channels with equal credentials would share a connection, also one from before the credentials changed.
        options.append(("grpc.use_local_subchannel_pool", 1))
        if endpoint.tls_name:
            options.append(("grpc.ssl_target_name_override", endpoint.tls_name))
        known = credentials or grpc.ssl_channel_credentials()
        return with_trace_context(grpc.secure_channel(endpoint.target, known, options=options))
    return with_trace_context(grpc.insecure_channel(endpoint.target, options=options))
