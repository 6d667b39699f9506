"""``P2pService``: workers publish the models that they hold, and find others that hold the same."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import grpc

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.contracts.metadata_store import (
    MetadataStore,
    NotPublisherError,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
)
from modelexpress_core.contracts.rights import PUBLISH, READ, Rights
from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.server.settings import ServerSettings
from modelexpress_core.settings import from_env
from modelexpress_core.wire.authentication import caller
from modelexpress_core.wire.grants import new_grant_key
from modelexpress_core.wire.identities import identity_from_message
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from modelexpress_core.wire.rpc import P2P, RpcContext, handler, peer_address
from modelexpress_core.wire.settings import AuthSettings

__all__ = ["P2pService", "make_p2p"]

_MAX_U64 = (1 << 64) - 1
_DIGITS = 20


def make_p2p(context: ServiceContext) -> grpc.GenericRpcHandler[Any, Any]:
    """The handler of ``P2pService``."""
    settings = from_env(ServerSettings, context.settings)
    rights = from_env(AuthSettings, context.settings).rights
    return handler(P2P, P2pService(context.store, settings.heartbeat_timeout_seconds, rights))


class P2pService:
    """Keeps sources in the store, and lists them.

    A request that lacks something is answered with ``success=False``, as clients expect, and a failure of the store
    with a gRPC status.

    Args:
        store: The store of sources.
        heartbeat_timeout_seconds: A source without a heartbeat for longer is not listed as ready.
        rights: What callers may publish and read; everything by default.
    """

    def __init__(self, store: MetadataStore, heartbeat_timeout_seconds: float, rights: Rights | None = None) -> None:
        self._store = store
        self._rights = rights or Rights()
        self._timeout_ms = int(heartbeat_timeout_seconds * 1000)

    async def publish_metadata(
        self, request: p2p_pb2.PublishMetadataRequest, context: RpcContext
    ) -> p2p_pb2.PublishMetadataResponse:
        """Store what a worker holds."""
        problem = _problem(request)
        if problem:
            return p2p_pb2.PublishMetadataResponse(success=False, message=problem)
        identity = identity_from_message(request.identity)
        publisher = caller.get()
        if not self._rights.allows(publisher, PUBLISH, identity.model_name):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, lacks_right(publisher, PUBLISH, identity.model_name))
        worker = request.worker
        record = SourceRecord(
            source_id=identity.source_id,
            worker_id=request.worker_id,
            model_name=identity.model_name,
            worker_rank=worker.worker_rank,
            status=_known_status(worker.status),
            accelerator=worker.accelerator,
            topology=worker.topology,
            training_step=_training_step(identity),
            layout_signature=identity.extra_parameters.get("layout_signature"),
            publisher=publisher,
            publisher_address=peer_address(context) if publisher else "",
        )
        worker.ClearField("status")
        worker.ClearField("updated_at")
        grant_key = new_grant_key() if publisher else b""
        source = StoredSource(
            record, request.identity.SerializeToString(), worker.SerializeToString(), grant_key=grant_key
        )
        try:
            await self._store.publish(source)
        except NotPublisherError as exc:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(exc))
        return p2p_pb2.PublishMetadataResponse(
            success=True,
            message="published",
            mx_source_id=record.source_id,
            worker_id=record.worker_id,
            grant_key=grant_key,
            server_time_ms=now_ms(),
        )

    async def list_sources(self, request: p2p_pb2.ListSourcesRequest, _: RpcContext) -> p2p_pb2.ListSourcesResponse:
        """Sources that pass all filters, those with the latest heartbeat first.

        Sources of models that the caller may not read are left out.
        """
        reader = caller.get()
        source_id = identity_from_message(request.identity).source_id if request.identity.model_name else None
        query = SourceQuery(
            source_id=source_id,
            model_name=request.model_name_filter or None,
            status=request.status_filter if request.HasField("status_filter") else None,
        )
        listing = await self._store.list(query)
        since = listing.as_of_ms - self._timeout_ms if query.status == SourceStatus.READY else 0
        records = [record for record in listing.records if record.updated_at_ms >= since and _passes(record, request)]
        if self._rights.rules:
            readable = {
                model: self._rights.allows(reader, READ, model) for model in {record.model_name for record in records}
            }
            records = [record for record in records if readable[record.model_name]]
        records.sort(key=lambda record: (-record.updated_at_ms, record.worker_id))
        return p2p_pb2.ListSourcesResponse(instances=_references(records[: request.limit or None]), caller=reader)

    async def get_metadata(
        self, request: p2p_pb2.GetMetadataRequest, context: RpcContext
    ) -> p2p_pb2.GetMetadataResponse:
        """Everything that a worker published."""
        source = await self._store.get(request.mx_source_id, request.worker_id)
        if source is None:
            return p2p_pb2.GetMetadataResponse(found=False)
        record = source.record
        if not self._rights.allows(caller.get(), READ, record.model_name):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, lacks_right(caller.get(), READ, record.model_name))
        response = p2p_pb2.GetMetadataResponse(
            found=True,
            mx_source_id=record.source_id,
            worker_id=record.worker_id,
            publisher=record.publisher,
            publisher_address=record.publisher_address,
        )
        response.worker.ParseFromString(source.worker)
        response.identity.ParseFromString(source.identity)
        silent = source.as_of_ms - record.updated_at_ms > self._timeout_ms
        stale = record.status == SourceStatus.READY and silent
        response.worker.status = SourceStatus.STALE if stale else record.status  # type: ignore[assignment]  # the same numbers
        response.worker.updated_at = record.updated_at_ms
        return response

    async def update_status(
        self, request: p2p_pb2.UpdateStatusRequest, context: RpcContext
    ) -> p2p_pb2.UpdateStatusResponse:
        """A heartbeat, or a change of state. A worker that is unknown has to publish again."""
        load = request.source_load if math.isfinite(request.source_load) and request.HasField("source_load") else None
        try:
            known = await self._store.update(
                request.mx_source_id, request.worker_id, _known_status(request.status), load, caller.get()
            )
        except NotPublisherError as exc:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(exc))
        if not known:
            message = f"unknown worker {request.worker_id!r} of source {request.mx_source_id!r}; publish it again"
            return p2p_pb2.UpdateStatusResponse(success=False, message=message)
        return p2p_pb2.UpdateStatusResponse(success=True, message="updated", server_time_ms=now_ms())


def lacks_right(name: str, right: str, model: str) -> str:
    """The text of an answer to a caller that lacks a right."""
    return f"{name!r} may not {right} {model!r}: no rule of the server's rights allows it"


def now_ms() -> int:
    """The server's time, in milliseconds since 1970: the clock by which read grants expire."""
    return time.time_ns() // 1_000_000


def _problem(request: p2p_pb2.PublishMetadataRequest) -> str:
    """The first missing part, in the order and the words of the protocol; empty if nothing is missing."""
    if not request.HasField("identity"):
        return "identity is required"
    if not request.identity.model_name:
        return "identity.model_name is required"
    if not request.worker_id:
        return "worker_id is required"
    return "" if request.HasField("worker") else "worker is required"


def _known_status(status: int) -> int:
    """``status``, or UNKNOWN for a number without a meaning: stores keep an index of each."""
    return status if status in _STATUSES else SourceStatus.UNKNOWN


_STATUSES = frozenset(SourceStatus)


def _training_step(identity: SourceIdentity) -> int | None:
    for key in ("training_step", "version"):
        text = identity.extra_parameters.get(key, "")
        if text.isascii() and text.isdigit() and len(text) <= _DIGITS and int(text) <= _MAX_U64:
            return int(text)
    return None


def _passes(record: SourceRecord, request: p2p_pb2.ListSourcesRequest) -> bool:
    """Whether ``record`` passes the filters that stores do not have."""
    if request.HasField("worker_rank_filter") and record.worker_rank != request.worker_rank_filter:
        return False
    if request.HasField("min_updated_at") and record.updated_at_ms < request.min_updated_at:
        return False
    if not request.HasField("min_training_step"):
        return True
    return record.training_step is not None and record.training_step >= request.min_training_step


def _references(records: Sequence[SourceRecord]) -> Sequence[p2p_pb2.SourceInstanceRef]:
    return [
        p2p_pb2.SourceInstanceRef(
            mx_source_id=record.source_id,
            worker_id=record.worker_id,
            model_name=record.model_name,
            worker_rank=record.worker_rank,
            accelerator=record.accelerator,
            updated_at=record.updated_at_ms,
            training_step=record.training_step,
            layout_signature=record.layout_signature,
            topology=dict(record.topology),
            source_load=record.source_load,
            publisher=record.publisher,
            publisher_address=record.publisher_address,
        )
        for record in records
    ]
