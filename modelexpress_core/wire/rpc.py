"""The services of the protocol: their method paths and messages, served and called with messages of our own.

The paths are those that existing programs use. The messages have names of their own, so that those programs' generated
code can be imported in the same process; on the wire only paths, field numbers and types count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import grpc
from attrs import frozen
from google.protobuf.message import DecodeError, Message

from modelexpress_core.wire.proto.modelexpress import api_pb2, health_pb2, p2p_pb2

__all__ = [
    "API",
    "HEALTH",
    "MESSAGE_OPTIONS",
    "P2P",
    "STANDARD_HEALTH",
    "WORKER",
    "Method",
    "Service",
    "handler",
    "stub",
]

#: Metadata of a worker with many tensors is long.
_MAX_MESSAGE_BYTES = 100 << 20

#: What servers and channels have in common.
MESSAGE_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
)


@frozen
class Method:
    """A call with one request.

    Attributes:
        request: Message that is sent.
        response: Message that comes back.
        streams: Whether more than one comes back.
    """

    request: type[Message]
    response: type[Message]
    streams: bool = False


@frozen(eq=False)
class Service:
    """A gRPC service.

    Attributes:
        name: Full name: ``"model_express.p2p.P2pService"``.
        methods: By name.
    """

    name: str
    methods: Mapping[str, Method]

    def path(self, method: str) -> str:
        """What HTTP/2 calls ``method``."""
        return f"/{self.name}/{method}"


HEALTH = Service(
    "model_express.health.HealthService",
    {"GetHealth": Method(health_pb2.GetHealthRequest, health_pb2.GetHealthResponse)},
)

STANDARD_HEALTH = Service(
    "grpc.health.v1.Health",
    {
        "Check": Method(health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse),
        "Watch": Method(health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse, streams=True),
    },
)

API = Service("model_express.api.ApiService", {"SendRequest": Method(api_pb2.Request, api_pb2.Response)})

P2P = Service(
    "model_express.p2p.P2pService",
    {
        "PublishMetadata": Method(p2p_pb2.PublishMetadataRequest, p2p_pb2.PublishMetadataResponse),
        "ListSources": Method(p2p_pb2.ListSourcesRequest, p2p_pb2.ListSourcesResponse),
        "GetMetadata": Method(p2p_pb2.GetMetadataRequest, p2p_pb2.GetMetadataResponse),
        "UpdateStatus": Method(p2p_pb2.UpdateStatusRequest, p2p_pb2.UpdateStatusResponse),
    },
)

WORKER = Service(
    "model_express.p2p.WorkerService",
    {
        "GetTensorManifest": Method(p2p_pb2.GetTensorManifestRequest, p2p_pb2.GetTensorManifestResponse),
        "PrepareTensorRead": Method(p2p_pb2.PrepareTensorReadRequest, p2p_pb2.PrepareTensorReadResponse),
        "ReleaseTensorRead": Method(p2p_pb2.ReleaseTensorReadRequest, p2p_pb2.ReleaseTensorReadResponse),
    },
)


class _Channel(Protocol):
    """A channel of ``grpc`` or ``grpc.aio``."""

    @property
    def unary_unary(self) -> Callable[..., Any]: ...

    @property
    def unary_stream(self) -> Callable[..., Any]: ...


def handler(service: Service, implementation: object) -> grpc.GenericRpcHandler[Any, Any]:
    """What an asyncio server adds to offer ``service``: its methods are those of ``implementation``, in snake case."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for name, method in service.methods.items():
        answer = getattr(implementation, _snake_case(name))
        if method.streams:
            handlers[name] = grpc.unary_stream_rpc_method_handler(
                answer, method.request.FromString, method.response.SerializeToString
            )
        else:
            handlers[name] = grpc.unary_unary_rpc_method_handler(
                _decoding(method.request, answer), response_serializer=method.response.SerializeToString
            )
    return grpc.method_handlers_generic_handler(service.name, handlers)


def _decoding(request: type[Message], answer: Callable[..., Any]) -> Callable[..., Any]:
    """``answer`` for the bytes of a request. gRPC itself would blame the server for those that are none."""

    async def decoding(data: bytes, context: Any) -> Any:  # noqa: ANN401 - of gRPC
        try:
            decoded = request.FromString(data)
        except DecodeError as exc:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no {request.DESCRIPTOR.name}: {exc}")
        return await answer(decoded, context)

    return decoding


def stub(service: Service, channel: _Channel) -> Mapping[str, Callable[..., Any]]:
    """Calls of ``service`` on ``channel`` by method name."""
    calls = {}
    for name, method in service.methods.items():
        make = channel.unary_stream if method.streams else channel.unary_unary
        calls[name] = make(
            service.path(name),
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
    return calls


def _snake_case(method: str) -> str:
    """``"ListSources"`` as Python writes it: ``"list_sources"``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", method).lower()
