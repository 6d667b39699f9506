"""Calls with deadlines, retries, and errors of ours: the base of the clients of all services."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import attrs
import grpc
from attrs import field, frozen
from google.protobuf.message import Message

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    DeadlineError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.messages import printable
from modelexpress_core.settings import from_env
from modelexpress_core.wire.channel import Connection
from modelexpress_core.wire.diagnosis import diagnose
from modelexpress_core.wire.rpc import Service
from modelexpress_core.wire.settings import TlsSettings, TokenSettings
from modelexpress_core.wire.streams import RequestStream, ResponseStream

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Client", "Security"]

_Code = grpc.StatusCode

#: A message or a frame, or an iterable of them where a method takes a stream.
_Request: TypeAlias = Message | bytes | Iterable[Message] | Iterable[bytes]

#: A server that cannot be called is diagnosed this often at most.
_DIAGNOSIS_SECONDS = 1.0

#: Error, likely cause and next step of the statuses that need their own.
_ERRORS: dict[grpc.StatusCode, tuple[type[BackendError], str, str]] = {
    _Code.UNAVAILABLE: (
        UnavailableError,
        "the connection broke, or the server waits for a service that is down",
        "try again; `mx health` tells whether the server runs",
    ),
    _Code.DEADLINE_EXCEEDED: (
        DeadlineError,
        "the server is overloaded, or something on the way drops packets",
        "try again; MX_SERVER_DEADLINE_SECONDS sets the deadline",
    ),
    _Code.UNAUTHENTICATED: (
        AccessDeniedError,
        "the server wants a token, and none or a wrong one was sent",
        "check the file that MX_AUTH_TOKEN_PATH names",
    ),
    _Code.PERMISSION_DENIED: (
        AccessDeniedError,
        "the caller may not make this call",
        "ask the operator of the server",
    ),
    _Code.FAILED_PRECONDITION: (
        NotFoundError,
        "the worker holds something else now, or is another worker than the one asked for",
        "find the workers that hold the model again",
    ),
    _Code.NOT_FOUND: (
        NotFoundError,
        "what the call asks for has ended, or never existed",
        "find the workers that hold the model again",
    ),
    _Code.RESOURCE_EXHAUSTED: (
        BackendError,
        "the message is longer than the server takes (MX_MAX_MESSAGE_BYTES), or the server has reached another limit",
        "publish less metadata: readers ask the worker for its tensors",
    ),
    _Code.INVALID_ARGUMENT: (
        BackendError,
        "the request lacks something, or the other side speaks another version of the protocol",
        "compare the versions of both: `mx health`",
    ),
    _Code.UNIMPLEMENTED: (
        UnsupportedError,
        "another program listens there, or a server of another version",
        "check host and port in MODEL_EXPRESS_URL",
    ),
}


#: Likely cause and next step of UNAUTHENTICATED where a token exists and was not sent.
_TOKEN_WITHHELD = (
    "the token was not sent, because the connection is not encrypted and others on the network could read it",
    "write https:// before the address of the server, or set MX_AUTH_TOKEN_PLAINTEXT=1 on a network that you trust",
)


@frozen
class Security:
    """How a client authenticates itself, and the server.

    Attributes:
        tls: Files of TLS, for servers that speak it.
        token: The file with the token that is sent; None to send none.
        tls_name: The name that the certificate of the server has to have; None for that of its host.
    """

    tls: TlsSettings = field(factory=TlsSettings)
    token: TokenSettings | None = field(factory=TokenSettings)
    tls_name: str | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Security:
        """From variables."""
        return cls(from_env(TlsSettings, environ), from_env(TokenSettings, environ))

    def for_worker(self) -> Security:
        """The same for a worker: the token goes to the server alone, and the certificate may have a name of its own."""
        return Security(self.tls, None, self.tls.peer_name)


class Client:
    """A connection to one server; thread-safe. The constructor sends nothing.

    Args:
        url: Address of the server: ``host:port``, or a URL; ``https://`` is TLS.
        services: The services that are called.
        deadline_seconds: Default deadline of a call, retries and streams included.
        security: Certificates and token.
        retries: Whether calls that find no server are repeated, within their deadline.
        most_answer_bytes: Longest answer that is taken; by default 100 MiB.

    Raises:
        InvalidURIError: By the constructor, if ``url`` is no address.
        SettingsError: By the constructor, if certificates cannot be used.
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
        most_answer_bytes: int | None = None,
    ) -> None:
        self._endpoint = attrs.evolve(Endpoint.parse(url), tls_name=security.tls_name)
        self._deadline_seconds = deadline_seconds
        self._security = security
        self._connection = Connection(
            self._endpoint,
            services,
            tls=security.tls,
            token=security.token,
            retries=retries,
            most_answer_bytes=most_answer_bytes,
        )
        self._diagnosed_at = -math.inf  # monotonic

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @property
    def url(self) -> str:
        """Address of the server, as a URL."""
        return str(self._endpoint)

    def _call(
        self,
        service: Service,
        method: str,
        request: _Request,
        *,
        deadline_seconds: float | None = None,
        credential: str | None = None,
    ) -> Any:  # noqa: ANN401 - the method's response
        """The response of ``method``.

        Args:
            service: The service.
            method: A method with one response.
            request: The request, or an iterable of them where they are a stream; gRPC reads it in another thread.
            deadline_seconds: Deadline of this call; by default the client's; ``math.inf`` for none.
            credential: A credential for this call, in place of the token.

        Raises:
            BackendError: The call failed.
            Exception: What the iterable raised.
        """
        requests = RequestStream(cast("Iterable[Any]", request)) if service.methods[method].request_streaming else None
        try:
            return self._begin(service, method, requests or request, deadline_seconds, credential)
        except grpc.RpcError as exc:
            if requests is not None and requests.error is not None:
                raise requests.error from None
            raise self._error(exc, method) from exc

    def _stream(
        self,
        service: Service,
        method: str,
        request: _Request,
        *,
        deadline_seconds: float | None = None,
    ) -> ResponseStream[Any]:
        """The responses of ``method``, one by one; to be closed, or read to its end.

        Args:
            service: The service.
            method: A method with a stream of responses.
            request: The request, or an iterable of them where they are a stream; gRPC reads it in another thread.
            deadline_seconds: Deadline of this call until its last response; by default the client's; ``math.inf`` for
                none.

        Raises:
            BackendError: The call failed; mostly the iterator raises it.
        """
        requests = RequestStream(cast("Iterable[Any]", request)) if service.methods[method].request_streaming else None
        try:
            call = self._begin(service, method, requests or request, deadline_seconds)
        except grpc.RpcError as exc:
            raise self._error(exc, method) from exc
        return ResponseStream(call, lambda exc, closed: self._error(exc, method, closed=closed), requests)

    def _begin(
        self,
        service: Service,
        method: str,
        request: Any,  # noqa: ANN401 - of gRPC
        deadline_seconds: float | None,
        credential: str | None = None,
    ) -> Any:  # noqa: ANN401 - of gRPC
        seconds = self._deadline_seconds if deadline_seconds is None else deadline_seconds
        timeout = None if math.isinf(seconds) else seconds
        try:
            return self._connection.call(service, method, request, timeout, credential)
        except ValueError as exc:  # gRPC raises it if another thread closes the channel meanwhile
            raise self._closed_error(method) from exc

    def _error(self, exc: Any, method: str, *, closed: bool = False) -> BackendError:  # noqa: ANN401 - annotations give it no code
        code = exc.code()
        if code is _Code.CANCELLED and (closed or self._connection.closed):
            return self._closed_error(method)
        error: BackendError | None = None
        now = time.monotonic()
        # Not for each failure: more connections would not help a server that a whole fleet cannot reach.
        if code in {_Code.UNAVAILABLE, _Code.DEADLINE_EXCEEDED} and now - self._diagnosed_at >= _DIAGNOSIS_SECONDS:
            self._diagnosed_at = now
            error = diagnose(self._endpoint, self._security.tls)
        if error is None:
            kind, cause, hint = _ERRORS.get(code, (BackendError, "", "look into the log of the server"))
            if code is _Code.UNAUTHENTICATED and self._connection.withholds_token:
                cause, hint = _TOKEN_WITHHELD
            error = kind(
                f"the server answered {code.name}: {printable(str(exc.details()))}", cause=cause or None, hint=hint
            )
        error.uri, error.operation = str(self._endpoint), f"call {method}"
        return error

    def _closed_error(self, method: str) -> BackendError:
        return UnavailableError(
            "the connection was closed on this side",
            uri=str(self._endpoint),
            operation=f"call {method}",
            retryable=False,
            hint="keep the client, and the stream, open for as long as they are used",
        )
