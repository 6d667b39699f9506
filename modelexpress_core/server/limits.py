"""What a record may contain, and how many bytes of records a caller may keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grpc
from attrs import frozen

from modelexpress_core.contracts.metadata_store import Quota, StoreFullError
from modelexpress_core.server.settings import LimitSettings
from modelexpress_core.wire.authentication import caller
from modelexpress_core.wire.peers import peer_host
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from modelexpress_core.wire.rpc import RpcContext, RpcHandler, behaviour_of, make_handler

__all__ = ["FewEntries", "RecordLimits"]

#: Bytes of an entry of a message on average, at least. The tensors of real workers take 60 and more.
_ENTRY_BYTES = 16

#: Shorter messages cannot hold many entries.
_SHORT_BYTES = 64 << 10

#: Bytes with which entries begin: tensors in either list, and keys of maps. They occur within other values, too, but
#: there is no entry without one of them.
_ENTRY_TAGS = (b"\x1a", b"\x0a")


@frozen(eq=False)
class FewEntries(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # it is generic in the annotations alone
    """Refuses messages of many tiny entries, before they are decoded.

    An empty tensor has two bytes, and takes 76 bytes of memory once it is decoded: 16 MiB of them would take 600 MiB,
    and a second, in which no other call is answered.

    Attributes:
        handler: The handler of the service.
        message_bytes: The longest message, which bounds the number of entries.
    """

    handler: grpc.GenericRpcHandler[Any, Any]
    message_bytes: int

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> RpcHandler | None:
        """The handler of a call."""
        handler = self.handler.service(handler_call_details)
        return None if handler is None else self._checking(handler)

    def _checking(self, handler: RpcHandler) -> RpcHandler:
        answer = behaviour_of(handler)
        most = self.message_bytes // _ENTRY_BYTES

        async def checked(data: bytes, context: RpcContext) -> Any:  # noqa: ANN401 - any message
            if len(data) > _SHORT_BYTES and sum(data.count(tag) for tag in _ENTRY_TAGS) > most:
                reason = f"the message has more than {most} entries, a sixteenth of MX_MAX_MESSAGE_BYTES"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
            return await answer(data, context)

        return make_handler(
            checked,
            request_streaming=handler.request_streaming,
            response_streaming=handler.response_streaming,
            encode=handler.response_serializer,
        )


class RecordLimits:
    """Checks records before they are stored. Each refusal names the limit and its setting.

    Args:
        settings: The limits.
    """

    def __init__(self, settings: LimitSettings) -> None:
        self._settings = settings

    def problem(self, request: p2p_pb2.PublishMetadataRequest) -> str:
        """The first limit that ``request`` exceeds, as a sentence; empty if it exceeds none."""
        settings = self._settings
        for name, texts in (
            ("worker.topology", request.worker.topology),
            ("identity.extra_parameters", request.identity.extra_parameters),
        ):
            if len(texts) > settings.entries:
                return f"{name} has {len(texts)} entries; the limit is {settings.entries} (MX_MAX_ENTRIES)"
        for name, text in _texts(request):
            size = len(text.encode())
            if size > settings.string_bytes:
                return f"{name} has {size} bytes; the limit is {settings.string_bytes} (MX_MAX_STRING_BYTES)"
        size = _size_bytes(request.worker.topology)
        if size > settings.topology_bytes:
            return f"worker.topology has {size} bytes; the limit is {settings.topology_bytes} (MX_MAX_TOPOLOGY_BYTES)"
        return ""

    def quota(self, context: RpcContext) -> Quota:
        """The quota of the present caller."""
        name = caller.get()
        owner = f"name {name}" if name else f"address {peer_host(context.peer())}"
        return Quota(owner, self._settings.caller_bytes, self._settings.records_bytes)

    def full(self, error: StoreFullError, quota: Quota, size_bytes: int) -> str:
        """Why the store did not take a record of ``size_bytes``."""
        if error.of_owner:
            limit = f"the limit for the caller with the {quota.owner} is {quota.owner_bytes} (MX_MAX_CALLER_BYTES)"
        else:
            limit = f"the limit for the records of all callers is {quota.total_bytes} (MX_MAX_RECORDS_BYTES)"
        return f"the record counts {size_bytes} bytes, and there is no room for it: {limit}"


def _texts(request: p2p_pb2.PublishMetadataRequest) -> Iterator[tuple[str, str]]:
    """Each text of the request that lists or messages may repeat, with its name."""
    yield "worker_id", request.worker_id
    for prefix, message in (("identity", request.identity), ("worker", request.worker)):
        for field, value in message.ListFields():
            name = f"{prefix}.{field.name}"
            if isinstance(value, str):
                yield name, value
            elif field.name in {"topology", "extra_parameters"}:
                for key, text in value.items():
                    yield f"a key of {name}", key
                    yield f"{name}[{key[:64]!r}]", text
            elif field.name == "artifact_source":
                yield f"{name}.artifact_id", value.artifact_id


def _size_bytes(texts: Mapping[str, str]) -> int:
    return sum(len(key.encode()) + len(text.encode()) for key, text in texts.items())
