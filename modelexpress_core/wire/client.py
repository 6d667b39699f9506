"""Calls with deadlines, retries, and errors of our own: what clients of every service have in common."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from attrs import field, frozen
from google.protobuf.message import Message

from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.settings import from_env
from modelexpress_core.wire.channel import Connection, Endpoint
from modelexpress_core.wire.diagnosis import diagnose
from modelexpress_core.wire.rpc import Service
from modelexpress_core.wire.settings import TlsSettings, TokenSettings

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Client", "Security"]

_Code = grpc.StatusCode

#: A server that cannot be called is looked at this often at most.
_LOOK_SECONDS = 1.0

#: Error and likely cause for each status that has one of its own.
_ERRORS: dict[grpc.StatusCode, tuple[type[BackendError], str, str]] = {
    _Code.UNAVAILABLE: (
        UnavailableError,
        "the connection broke, or what the server depends on is down",
        "try again; `mx health` tells whether the server runs",
    ),
    _Code.DEADLINE_EXCEEDED: (
        DeadlineError,
        "the server is overloaded, or something on the way drops packets",
        "try again; MX_SERVER_DEADLINE_SECONDS sets how long is waited",
    ),
    _Code.UNAUTHENTICATED: (
        AccessDeniedError,
        "the server wants a token, and none or a wrong one was sent",
        "check the file that MX_AUTH_TOKEN_PATH names",
    ),
    _Code.PERMISSION_DENIED: (
        AccessDeniedError,
        "the server knows who asks, and does not let them",
        "ask whoever runs the server",
    ),
    _Code.FAILED_PRECONDITION: (
        NotFoundError,
        "a worker holds something else now, or is another one than was asked for",
        "look again who holds the model",
    ),
    _Code.NOT_FOUND: (
        NotFoundError,
        "what was asked for has ended, or never was",
        "look again who holds the model",
    ),
    _Code.RESOURCE_EXHAUSTED: (
        BackendError,
        "the message is longer than 100 MiB, or the server has run out of something",
        "publish less metadata: what lies where can be asked of the worker",
    ),
    _Code.INVALID_ARGUMENT: (
        BackendError,
        "the request lacks something, or the other side speaks another version of the protocol",
        "compare the versions of both: `mx health`",
    ),
    _Code.UNIMPLEMENTED: (
        UnsupportedError,
        "what listens there is another program, or a server of another version",
        "check host and port in MODEL_EXPRESS_URL",
    ),
}


@frozen
class Security:
    """How a client proves who it is, and knows the server.

    Attributes:
        tls: Files of TLS, where a server speaks it.
        token: Where the token is that is sent.
    """

    tls: TlsSettings = field(factory=TlsSettings)
    token: TokenSettings = field(factory=TokenSettings)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Security:
        """As the variables say."""
        return cls(from_env(TlsSettings, environ), from_env(TokenSettings, environ))


class Client:
    """A connection to one server; thread-safe. Made without a word sent.

    Args:
        url: Where it is: ``host:port``, or a URL; ``https://`` is TLS.
        services: What is called.
        deadline_seconds: How long each call may take, retries included.
        security: Certificates and token.
        retries: Whether calls that find no server are made again, within their deadline.

    Raises:
        InvalidURIError: By the constructor, where ``url`` is no address.
        SettingsError: By the constructor, where certificates cannot be used.
        BackendError: By each call: unavailable, access denied, deadline, unsupported.
    """

    def __init__(
        self,
        url: str,
        services: Iterable[Service],
        *,
        deadline_seconds: float,
        security: Security,
        retries: bool = True,
    ) -> None:
        self._endpoint = Endpoint.parse(url)
        self._deadline_seconds = deadline_seconds
        self._security = security
        self._connection = Connection(self._endpoint, services, tls=security.tls, token=security.token, retries=retries)
        self._looked_at = -math.inf  # monotonic

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _call(self, service: Service, method: str, request: Message) -> Any:  # noqa: ANN401 - the method's answer
        try:
            return self._connection.call(service, method, request, self._deadline_seconds)
        except grpc.RpcError as exc:
            raise self._error(exc, method) from exc
        except ValueError as exc:  # gRPC's own, where another thread closes it meanwhile
            raise UnavailableError(
                "the connection was closed on this side",
                uri=str(self._endpoint),
                operation=f"call {method}",
                retryable=False,
                hint="keep the client open for as long as it is used",
            ) from exc

    def _error(self, exc: Any, method: str) -> BackendError:  # noqa: ANN401 - annotations give it no code
        code = exc.code()
        error: BackendError | None = None
        now = time.monotonic()
        # Not each time: where a fleet cannot be served, nobody is helped by more connections.
        if code in {_Code.UNAVAILABLE, _Code.DEADLINE_EXCEEDED} and now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            error = diagnose(self._endpoint, self._security.tls)
        if error is None:
            kind, cause, hint = _ERRORS.get(code, (BackendError, "", "look into the log of the server"))
            error = kind(f"the server answered {code.name}: {exc.details()}", cause=cause or None, hint=hint)
        error.uri, error.operation = str(self._endpoint), f"call {method}"
        return error
