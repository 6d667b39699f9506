"""Calls to a server that speaks the protocol, ours or another: with deadlines, retries, and errors of our own."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import grpc

from modelexpress_core.errors import AccessDeniedError, BackendError, DeadlineError, UnavailableError, UnsupportedError
from modelexpress_core.sources.identity import SourceIdentity
from modelexpress_core.wire.channel import Endpoint, open_channel
from modelexpress_core.wire.proto.modelexpress import health_pb2, p2p_pb2
from modelexpress_core.wire.rpc import HEALTH, P2P, Service, stub

__all__ = ["ServerClient"]

_Code = grpc.StatusCode

#: Error and likely cause for each status that has one of its own.
_ERRORS: dict[grpc.StatusCode, tuple[type[BackendError], str, str]] = {
    _Code.UNAVAILABLE: (
        UnavailableError,
        "no server is there, one side speaks TLS and the other does not, or what it depends on is down",
        "check MODEL_EXPRESS_URL (https:// is TLS), and that the server runs: `mx health`",
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
    _Code.UNIMPLEMENTED: (
        UnsupportedError,
        "what listens there is another program, or a server of another version",
        "check host and port in MODEL_EXPRESS_URL",
    ),
}


class ServerClient:
    """A connection to one server; thread-safe. Made without a word sent.

    Args:
        url: Where it is: ``host:port``, or a URL.
        deadline_seconds: How long each call may take, retries included.

    Raises:
        InvalidURIError: By the constructor, where ``url`` is no address.
        BackendError: By each call: unavailable, access denied, deadline, unsupported.
    """

    def __init__(self, url: str, *, deadline_seconds: float = 10.0) -> None:
        self._endpoint = Endpoint.parse(url)
        self._deadline_seconds = deadline_seconds
        self._channel = open_channel(self._endpoint)
        self._stubs = {service.name: stub(service, self._channel) for service in (HEALTH, P2P)}

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def health(self) -> health_pb2.GetHealthResponse:
        """Version, status and uptime of the server."""
        response: health_pb2.GetHealthResponse = self._call(HEALTH, "GetHealth", health_pb2.GetHealthRequest())
        return response

    def publish(
        self, identity: SourceIdentity, worker: p2p_pb2.WorkerMetadata, worker_id: str
    ) -> p2p_pb2.PublishMetadataResponse:
        """Tell what a worker holds. Whether the server took it is in the response."""
        request = p2p_pb2.PublishMetadataRequest(identity=identity.to_message(), worker=worker, worker_id=worker_id)
        response: p2p_pb2.PublishMetadataResponse = self._call(P2P, "PublishMetadata", request)
        return response

    def list_sources(self, request: p2p_pb2.ListSourcesRequest | None = None) -> Sequence[p2p_pb2.SourceInstanceRef]:
        """The sources that fit; all by default. Those that spoke last come first."""
        response: p2p_pb2.ListSourcesResponse = self._call(P2P, "ListSources", request or p2p_pb2.ListSourcesRequest())
        return response.instances

    def metadata(self, source_id: str, worker_id: str) -> p2p_pb2.GetMetadataResponse:
        """All that a worker published; ``found`` says whether the server knows it."""
        request = p2p_pb2.GetMetadataRequest(mx_source_id=source_id, worker_id=worker_id)
        response: p2p_pb2.GetMetadataResponse = self._call(P2P, "GetMetadata", request)
        return response

    def update_status(self, request: p2p_pb2.UpdateStatusRequest) -> p2p_pb2.UpdateStatusResponse:
        """A heartbeat. Whoever is told that the server does not know the worker publishes again."""
        response: p2p_pb2.UpdateStatusResponse = self._call(P2P, "UpdateStatus", request)
        return response

    def _call(self, service: Service, method: str, request: Any) -> Any:  # noqa: ANN401 - messages of the method
        try:
            return self._stubs[service.name][method](request, timeout=self._deadline_seconds)
        except grpc.RpcError as exc:
            code = exc.code()
            kind, cause, hint = _ERRORS.get(code, (BackendError, "", ""))
            raise kind(
                f"the server answered {code.name}: {exc.details()}",
                uri=str(self._endpoint),
                operation=f"call {method}",
                cause=cause or None,
                hint=hint or "look into the log of the server",
            ) from exc
