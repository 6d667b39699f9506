"""The services of the protocol, and how a method of any kind is served and called.

The method paths are those of existing programs. The messages have other names, so that the generated code of those
programs can be imported in the same process; on the wire only paths, field numbers and types count.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NoReturn, Protocol, TypeAlias

import grpc
import grpc.aio
from attrs import frozen
from google.protobuf.message import DecodeError, Message

from modelexpress_core.wire.proto.modelexpress import (
    access_pb2,
    api_pb2,
    cache_pb2,
    health_pb2,
    model_pb2,
    p2p_pb2,
    peer_pb2,
)

__all__ = [
    "ACCESS",
    "API",
    "CACHE",
    "HEALTH",
    "LEASE",
    "MESSAGE_OPTIONS",
    "MODEL",
    "P2P",
    "PEER",
    "STANDARD_HEALTH",
    "WORKER",
    "Method",
    "RpcContext",
    "RpcHandler",
    "Service",
    "behaviour_of",
    "handler",
    "make_handler",
    "split_path",
    "stub",
    "write_all",
]

RpcContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
RpcHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

#: Metadata of a worker with many tensors is long.
_MAX_MESSAGE_BYTES = 100 << 20

#: Options that servers and channels share.
MESSAGE_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
)


@frozen
class Method:
    """A method of a service.

    Attributes:
        request: Class of its requests; ``bytes`` for raw frames, which protobuf does not touch.
        response: Class of its responses, likewise.
        request_streaming: Whether a call has a stream of requests.
        response_streaming: Whether a call has a stream of responses.
    """

    request: type[Message | bytes]
    response: type[Message | bytes]
    request_streaming: bool = False
    response_streaming: bool = False


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
        """The path of ``method`` in HTTP/2."""
        return f"/{self.name}/{method}"


HEALTH = Service(
    "model_express.health.HealthService",
    {"GetHealth": Method(health_pb2.GetHealthRequest, health_pb2.GetHealthResponse)},
)

STANDARD_HEALTH = Service(
    "grpc.health.v1.Health",
    {
        "Check": Method(health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse),
        "Watch": Method(health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse, response_streaming=True),
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

ACCESS = Service(
    "modelexpress.access.AccessService",
    {"GetReadGrant": Method(access_pb2.GetReadGrantRequest, access_pb2.GetReadGrantResponse)},
)

LEASE = Service(
    "modelexpress.access.LeaseService",
    {"RenewLease": Method(access_pb2.RenewLeaseRequest, access_pb2.RenewLeaseResponse)},
)

WORKER = Service(
    "model_express.p2p.WorkerService",
    {
        "GetTensorManifest": Method(p2p_pb2.GetTensorManifestRequest, p2p_pb2.GetTensorManifestResponse),
        "PrepareTensorRead": Method(p2p_pb2.PrepareTensorReadRequest, p2p_pb2.PrepareTensorReadResponse),
        "ReleaseTensorRead": Method(p2p_pb2.ReleaseTensorReadRequest, p2p_pb2.ReleaseTensorReadResponse),
    },
)

PEER = Service(
    "modelexpress.peer.PeerService",
    {
        "DescribeTensors": Method(peer_pb2.DescribeTensorsRequest, peer_pb2.DescribeTensorsResponse),
        "GetAccess": Method(peer_pb2.GetAccessRequest, peer_pb2.GetAccessResponse),
        "ListReaders": Method(peer_pb2.ListReadersRequest, peer_pb2.ListReadersResponse),
    },
)

MODEL = Service(
    "model_express.model.ModelService",
    {
        "EnsureModelDownloaded": Method(
            model_pb2.ModelDownloadRequest, model_pb2.ModelStatusUpdate, response_streaming=True
        ),
        "StreamModelFiles": Method(model_pb2.ModelFilesRequest, model_pb2.FileChunk, response_streaming=True),
        "ListModelFiles": Method(model_pb2.ModelFilesRequest, model_pb2.ListModelFilesResponse),
        "DeleteModel": Method(model_pb2.DeleteModelRequest, model_pb2.DeleteModelResponse),
    },
)

CACHE = Service(
    "modelexpress.cache.CacheService",
    {
        "OpenModel": Method(cache_pb2.OpenModelRequest, cache_pb2.OpenModelResponse, response_streaming=True),
        "ListFiles": Method(cache_pb2.ListFilesRequest, cache_pb2.ListFilesResponse),
        "ReadFile": Method(cache_pb2.ReadFileRequest, bytes, response_streaming=True),
        "OpenBulk": Method(cache_pb2.OpenBulkRequest, cache_pb2.OpenBulkResponse),
        "ReadManifest": Method(cache_pb2.ReadManifestRequest, cache_pb2.ReadManifestResponse),
        "CompareParts": Method(cache_pb2.ComparePartsRequest, cache_pb2.ComparePartsResponse),
        "ListModels": Method(cache_pb2.ListModelsRequest, cache_pb2.ListModelsResponse),
        "ValidateModel": Method(
            cache_pb2.ValidateModelRequest, cache_pb2.ValidateModelResponse, response_streaming=True
        ),
        "RemoveModel": Method(cache_pb2.RemoveModelRequest, cache_pb2.RemoveModelResponse),
        "GetCacheStats": Method(cache_pb2.GetCacheStatsRequest, cache_pb2.GetCacheStatsResponse),
    },
)


class _Channel(Protocol):
    """A channel of ``grpc`` or ``grpc.aio``."""

    @property
    def unary_unary(self) -> Callable[..., Any]: ...

    @property
    def unary_stream(self) -> Callable[..., Any]: ...

    @property
    def stream_unary(self) -> Callable[..., Any]: ...

    @property
    def stream_stream(self) -> Callable[..., Any]: ...


def split_path(path: str) -> tuple[str, str]:
    """Service and method of a path: ``"/package.Service/Method"``."""
    service, _, method = path.strip("/").partition("/")
    return service, method


# -- serving -----------------------------------------------------------------------------------------------------------


def handler(service: Service, implementation: object) -> grpc.GenericRpcHandler[Any, Any]:
    """The handler with which an asyncio server offers ``service``.

    A request that cannot be decoded is answered with INVALID_ARGUMENT, also within a stream of requests.

    Args:
        service: The service.
        implementation: Has a method for each of the service's, in snake case: a coroutine, or an asynchronous generator
            where responses are a stream. Its arguments are the request, or an asynchronous iterator of requests, and
            gRPC's context. It may return messages that are encoded already.
    """
    handlers = {
        name: make_handler(
            _decoding(method, getattr(implementation, _snake_case(name))),
            request_streaming=method.request_streaming,
            response_streaming=method.response_streaming,
            encode=_encoder(method.response),
        )
        for name, method in service.methods.items()
    }
    return grpc.method_handlers_generic_handler(service.name, handlers)


def make_handler(
    answer: Callable[..., Any],
    *,
    request_streaming: bool,
    response_streaming: bool,
    decode: Callable[[bytes], Any] | None = None,
    encode: Callable[[Any], bytes] | None = None,
) -> RpcHandler:
    """The handler of a method with these streams, which calls ``answer``."""
    return _HANDLER_MAKERS[bool(request_streaming), bool(response_streaming)](answer, decode, encode)


#: gRPC's functions by whether requests, and whether responses, are a stream.
_HANDLER_MAKERS: Mapping[tuple[bool, bool], Callable[..., RpcHandler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def behaviour_of(handler: RpcHandler) -> Callable[..., Any]:
    """The function that ``handler`` calls."""
    behaviour: Any = (
        (handler.stream_stream if handler.response_streaming else handler.stream_unary)
        if handler.request_streaming
        else (handler.unary_stream if handler.response_streaming else handler.unary_unary)
    )
    return behaviour  # type: ignore[no-any-return]  # it is a coroutine function or an asynchronous generator function


async def write_all(answers: Any, context: RpcContext) -> None:  # noqa: ANN401 - see below
    """Send a stream of responses: those of an asynchronous generator, or those that a coroutine writes itself.

    The generator is closed with the call. gRPC would leave one that was not read to its end to the garbage collector.
    """
    if not hasattr(answers, "__aiter__"):
        await answers
        return
    async with contextlib.aclosing(answers):
        async for answer in answers:
            await context.write(answer)


def _decoding(method: Method, answer: Callable[..., Any]) -> Callable[..., Any]:
    """``answer`` for requests as bytes: if gRPC decoded them, it would blame the server for undecodable ones."""
    if issubclass(method.request, bytes):
        return answer
    if method.request_streaming:
        return _decoding_streams(method.request, answer, response_streaming=method.response_streaming)
    request = method.request

    async def decoded(data: bytes, context: RpcContext) -> Any:  # noqa: ANN401 - any message
        try:
            message = request.FromString(data)
        except DecodeError as exc:
            await _abort_undecodable(request, exc, context)
        return await answer(message, context)

    async def decoded_to_stream(data: bytes, context: RpcContext) -> None:
        try:
            message = request.FromString(data)
        except DecodeError as exc:
            await _abort_undecodable(request, exc, context)
        await write_all(answer(message, context), context)

    return decoded_to_stream if method.response_streaming else decoded


def _decoding_streams(
    request: type[Message], answer: Callable[..., Any], *, response_streaming: bool
) -> Callable[..., Any]:
    """``answer`` for streams of requests as bytes."""

    async def messages(frames: AsyncIterator[bytes], context: RpcContext) -> AsyncIterator[Message]:
        async for data in frames:
            try:
                message = request.FromString(data)
            except DecodeError as exc:
                await _abort_undecodable(request, exc, context)
            yield message

    async def decoded(frames: AsyncIterator[bytes], context: RpcContext) -> Any:  # noqa: ANN401 - any message
        return await answer(messages(frames, context), context)

    async def decoded_to_stream(frames: AsyncIterator[bytes], context: RpcContext) -> None:
        await write_all(answer(messages(frames, context), context), context)

    return decoded_to_stream if response_streaming else decoded


async def _abort_undecodable(request: type[Message], exc: DecodeError, context: RpcContext) -> NoReturn:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no {request.DESCRIPTOR.name}: {exc}")


# -- calling -----------------------------------------------------------------------------------------------------------


def stub(service: Service, channel: _Channel) -> Mapping[str, Callable[..., Any]]:
    """Calls of ``service`` on ``channel`` by method name."""
    makers = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    return {
        name: makers[method.request_streaming, method.response_streaming](
            service.path(name),
            request_serializer=_encoder(method.request),
            response_deserializer=_decoder(method.response),
        )
        for name, method in service.methods.items()
    }


def _encoder(kind: type[Message | bytes]) -> Callable[[Any], bytes] | None:
    """Makes bytes of a message that is not encoded yet; None for raw frames, which gRPC passes on as they are."""
    if issubclass(kind, bytes):
        return None
    encode = kind.SerializeToString
    return lambda message: message if isinstance(message, bytes) else encode(message)


def _decoder(kind: type[Message | bytes]) -> Callable[[bytes], Any] | None:
    return None if issubclass(kind, bytes) else kind.FromString


def _snake_case(method: str) -> str:
    """``"ListSources"`` as Python writes it: ``"list_sources"``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", method).lower()
