"""``P2pService``: workers publish the models that they hold, and find others that hold the same."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import itertools
import logging
import math
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from attrs import frozen
from google.protobuf.message import DecodeError
from prometheus_client import CollectorRegistry

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.contracts.metadata_store import (
    MetadataStore,
    NotPublisherError,
    PodReference,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
    StoreFullError,
    StoreUnavailableError,
    UnreadableRecordError,
)
from modelexpress_core.contracts.rights import PUBLISH, READ, Rights
from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.server.clock import now_ms
from modelexpress_core.server.deadlines import time_out
from modelexpress_core.server.limits import FewEntries, RecordLimits
from modelexpress_core.server.metrics import SourceServiceMetrics
from modelexpress_core.server.pacing import Pacer, merge_sorted
from modelexpress_core.server.services.authorization import require_right
from modelexpress_core.server.settings import LimitSettings, ServerSettings
from modelexpress_core.settings import from_env
from modelexpress_core.wire.admission import reserve_answer, try_reserve_answer
from modelexpress_core.wire.authentication import caller
from modelexpress_core.wire.grants import new_grant_key
from modelexpress_core.wire.identities import identity_from_message
from modelexpress_core.wire.peers import peer_address
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from modelexpress_core.wire.rpc import P2P, RpcContext, handler
from modelexpress_core.wire.settings import AuthSettings

__all__ = ["P2pService", "make_p2p"]

_log = logging.getLogger(__name__)

_MAX_U64 = (1 << 64) - 1
_DIGITS = 20

#: How long a list waits for those before it.
_TURN_SECONDS = 10.0

#: Bytes of a page at least: whatever is asked for, pages advance.
_MIN_PAGE_BYTES = 64 << 10

#: Records that a finished list frees at once.
_FREED = 256

#: Bytes of a record that is returned with both lists of its tensors; callers receive up to 100 MiB.
_MAX_RECORD_BYTES = 96 << 20

#: Metadata at the end of a list that is not complete: how many sources it lacks.
_LEFT_OUT = "mx-left-out"


def make_p2p(context: ServiceContext) -> grpc.GenericRpcHandler[Any, Any]:
    """The handler of ``P2pService``."""
    settings = from_env(ServerSettings, context.settings)
    limit_settings = from_env(LimitSettings, context.settings)
    limits = RecordLimits(limit_settings)
    metrics = SourceServiceMetrics(context.metrics)
    rights = from_env(AuthSettings, context.settings).rights
    service = P2pService(context.store, settings.heartbeat_timeout_seconds, rights, limits=limits, metrics=metrics)
    return FewEntries(handler(P2P, service), limit_settings.message_bytes)


@frozen
class _Page:
    """A list, or a part of it.

    Attributes:
        data: The serialised response.
        left_out: Number of sources for which it had no room, and which no later page has.
    """

    data: bytes
    left_out: int


class P2pService:
    """Keeps sources in the store, and lists them.

    A request that lacks something is answered with ``success=False``, as clients expect, and a failure of the store
    with a gRPC status.

    Args:
        store: The store of sources.
        heartbeat_timeout_seconds: A source without a heartbeat for longer is not listed as ready.
        rights: What callers may publish and read; everything by default.
        limits: What records may contain.
        metrics: Metrics of this service.
        list_bytes: Bytes of a list for callers that do not know pages. They receive up to 100 MiB.
    """

    def __init__(
        self,
        store: MetadataStore,
        heartbeat_timeout_seconds: float,
        rights: Rights | None = None,
        *,
        limits: RecordLimits | None = None,
        metrics: SourceServiceMetrics | None = None,
        list_bytes: int = 64 << 20,
    ) -> None:
        self._store = store
        self._rights = rights or Rights()
        self._limits = limits or RecordLimits(LimitSettings())
        self._metrics = metrics or SourceServiceMetrics(CollectorRegistry())
        self._list_bytes = list_bytes
        self._listing = asyncio.Semaphore(1)  # one list is made at a time: each takes memory, and the event loop's time
        self._timeout_ms = int(heartbeat_timeout_seconds * 1000)

    async def publish_metadata(
        self, request: p2p_pb2.PublishMetadataRequest, context: RpcContext
    ) -> p2p_pb2.PublishMetadataResponse:
        """Store what a worker holds."""
        problem = _problem(request) or self._exceeded_limit(request)
        if problem:
            return p2p_pb2.PublishMetadataResponse(success=False, message=problem)
        identity = identity_from_message(request.identity)
        publisher = caller.get()
        await require_right(self._rights, PUBLISH, identity.model_name, context)
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
            publisher_address=peer_address(context.peer() or "") if publisher else "",
        )
        _keep_one_list(worker)
        worker.ClearField("status")
        worker.ClearField("updated_at")
        grant_key = new_grant_key() if publisher else b""
        source = StoredSource(
            record,
            request.identity.SerializeToString(),
            worker.SerializeToString(),
            grant_key=grant_key,
            pod=PodReference(request.pod_name, request.pod_uid, request.pod_namespace) if request.pod_uid else None,
        )
        if problem := await self._publish(source, context):
            return p2p_pb2.PublishMetadataResponse(success=False, message=problem)
        return p2p_pb2.PublishMetadataResponse(
            success=True,
            message="published",
            mx_source_id=record.source_id,
            worker_id=record.worker_id,
            grant_key=grant_key,
            server_time_ms=now_ms(),
        )

    def _exceeded_limit(self, request: p2p_pb2.PublishMetadataRequest) -> str:
        """The limit that ``request`` exceeds, as a sentence; empty if it exceeds none."""
        problem = self._limits.problem(request)
        if problem:
            self._metrics.refused.inc()
        return problem

    async def _publish(self, source: StoredSource, context: RpcContext) -> str:
        """Store ``source`` within the quota of the caller; returns why there is no room, or an empty text."""
        quota = self._limits.quota(context)
        try:
            await self._store.publish(source, quota)
        except NotPublisherError as exc:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(exc))
        except StoreFullError as exc:
            self._metrics.refused.inc()
            return self._limits.full(exc, quota, source.size_bytes)
        return ""

    async def list_sources(self, request: p2p_pb2.ListSourcesRequest, context: RpcContext) -> bytes:
        """Sources that pass all filters, those with the latest heartbeat first; or a page of them in the order of ids.

        Returns:
            A serialised ``ListSourcesResponse``. One without pages has at most 64 MiB: the sources with the latest
            heartbeats, and the number of the others in the metadata at the end.
        """
        after = _position(request.page_token)
        if after is None:
            reason = "page_token is not one that this server gave; ask for the first page again"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
        room_bytes = self._list_bytes
        if request.page_bytes:
            room_bytes = min(max(request.page_bytes, _MIN_PAGE_BYTES), self._list_bytes)
        room_bytes -= _TOKEN_BYTES
        async with self._turn_to_list():
            page = await self._page(request, after, room_bytes)
            has_room = try_reserve_answer(len(page.data))
        if not has_room:  # what waits for room holds no list
            room_bytes = min(room_bytes, len(page.data) + _TOKEN_BYTES)
            del page
            await reserve_answer(room_bytes)
            async with self._turn_to_list():
                page = await self._page(request, after, room_bytes)
        if page.left_out:
            self._metrics.truncated.inc()
            context.set_trailing_metadata(((_LEFT_OUT, str(page.left_out)),))
        return page.data

    @contextlib.asynccontextmanager
    async def _turn_to_list(self) -> AsyncIterator[None]:
        """Let one list at a time be made.

        Raises:
            StoreUnavailableError: The lists before it take too long; the store is slow, or frozen.
        """
        seconds = time_out(_TURN_SECONDS)
        try:
            await asyncio.wait_for(self._listing.acquire(), seconds)
        except asyncio.TimeoutError as exc:
            message = f"other lists have waited for it for {seconds:.1f} s"
            raise StoreUnavailableError(message) from exc
        try:
            yield
        finally:
            self._listing.release()

    async def _page(self, request: p2p_pb2.ListSourcesRequest, after: tuple[str, str] | None, room_bytes: int) -> _Page:
        """The sources after the position ``after``, as many as ``room_bytes`` hold."""
        records = await self._matching(request)
        in_pages = bool(request.page_bytes)
        number = min(request.limit or len(records), len(records))
        ordered: Iterable[SourceRecord]
        if in_pages:
            if number < len(records):
                records = await _first(await merge_sorted(records, _by_heartbeat), number)
            ordered = await merge_sorted([each for each in records if _by_id(each) > (after or ("", ""))], _by_id)
        else:
            ordered = itertools.islice(await merge_sorted(records, _by_heartbeat), number)
        data = bytearray()  # serialised messages one after the other are the message with all their entries
        left_out = 0
        last, token = ("", ""), ""
        pacer = Pacer()
        for taken, record in enumerate(ordered):
            await pacer.pause()
            part = p2p_pb2.ListSourcesResponse(instances=[_reference(record)]).SerializeToString()
            if len(part) > room_bytes:  # no page has room for it
                left_out += 1
            elif len(data) + len(part) <= room_bytes:
                data += part
            elif in_pages:
                token = _token(last)
                break
            else:
                left_out += number - taken
                break
            last = _by_id(record)
        data += p2p_pb2.ListSourcesResponse(next_page_token=token, caller=caller.get()).SerializeToString()
        del ordered
        while records:  # to free tens of thousands at once takes as long as some slices
            del records[-_FREED:]
            await pacer.pause(_FREED)
        return _Page(bytes(data), left_out)

    async def _matching(self, request: p2p_pb2.ListSourcesRequest) -> list[SourceRecord]:
        """The sources that pass all filters, in any order."""
        source_id = identity_from_message(request.identity).source_id if request.identity.model_name else None
        query = SourceQuery(
            source_id=source_id,
            model_name=request.model_name_filter or None,
            status=request.status_filter if request.HasField("status_filter") else None,
        )
        listing = await self._store.list(query)
        if listing.unreadable:
            self._metrics.unreadable.inc(listing.unreadable)
            _log.warning("%d records in the metadata store cannot be read, and are left out", listing.unreadable)
        since = listing.as_of_ms - self._timeout_ms if query.status == SourceStatus.READY else 0
        records = []
        readable: dict[str, bool] = {}
        pacer = Pacer()
        for record in listing.records:
            await pacer.pause()
            model = record.model_name
            if self._rights.rules and model not in readable:
                readable[model] = self._rights.allows(caller.get(), READ, model)
            if record.updated_at_ms >= since and readable.get(model, True) and _passes(record, request):
                records.append(record)
        return records

    async def get_metadata(
        self, request: p2p_pb2.GetMetadataRequest, context: RpcContext
    ) -> p2p_pb2.GetMetadataResponse:
        """Everything that a worker published, with its tensors in both lists of the protocol."""
        try:
            source = await self._store.get(request.mx_source_id, request.worker_id)
            if source is None:
                return p2p_pb2.GetMetadataResponse(found=False)
            record = source.record
            await require_right(self._rights, READ, record.model_name, context)
            await reserve_answer(2 * len(source.worker) + len(source.identity))
            response = p2p_pb2.GetMetadataResponse(
                found=True,
                mx_source_id=record.source_id,
                worker_id=record.worker_id,
                publisher=record.publisher,
                publisher_address=record.publisher_address,
            )
            response.worker.ParseFromString(source.worker)
            response.identity.ParseFromString(source.identity)
        except (UnreadableRecordError, DecodeError) as exc:
            self._metrics.unreadable.inc()
            _log.warning("%r of source %r is not returned: %s", request.worker_id, request.mx_source_id, exc)
            return p2p_pb2.GetMetadataResponse(found=False)
        if 2 * len(source.worker) <= _MAX_RECORD_BYTES:
            _fill_both_lists(response.worker)
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


def _reference(record: SourceRecord) -> p2p_pb2.SourceInstanceRef:
    return p2p_pb2.SourceInstanceRef(
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


# -- both lists of tensors ---------------------------------------------------------------------------------------------


def _keep_one_list(worker: p2p_pb2.WorkerMetadata) -> None:
    """Remove the older list of tensors if it equals the newer one: answers contain both anyway."""
    if worker.WhichOneof("source") != "tensor_source" or not worker.tensors:
        return
    if p2p_pb2.TensorSource(tensors=worker.tensors) == worker.tensor_source:
        worker.ClearField("tensors")


def _fill_both_lists(worker: p2p_pb2.WorkerMetadata) -> None:
    """Fill the list of tensors that the publisher did not write: readers look into one or the other."""
    source = worker.WhichOneof("source")
    if source == "tensor_source" and not worker.tensors:
        worker.tensors.MergeFrom(worker.tensor_source.tensors)
    elif source is None and worker.tensors:
        worker.tensor_source.tensors.MergeFrom(worker.tensors)


# -- pages -------------------------------------------------------------------------------------------------------------

#: Room for the token at the end of a page: two ids of the longest usual kind in base64.
_TOKEN_BYTES = 32 << 10


def _by_heartbeat(record: SourceRecord) -> tuple[int, str, str]:
    return (-record.updated_at_ms, record.worker_id, record.source_id)


def _by_id(record: SourceRecord) -> tuple[str, str]:
    return (record.source_id, record.worker_id)


async def _first(records: Iterable[SourceRecord], number: int) -> list[SourceRecord]:
    pacer = Pacer()
    first = []
    for _, record in zip(range(number), records, strict=False):
        await pacer.pause()
        first.append(record)
    return first


def _token(position: tuple[str, str]) -> str:
    """The token of the page after ``position``: two ids, of which the first has no NUL in it."""
    return base64.urlsafe_b64encode("\0".join(position).encode()).decode()


def _position(token: str) -> tuple[str, str] | None:
    """The position in ``token``; the first one for an empty token, and None for what is no token."""
    if not token:
        return ("", "")
    try:
        source_id, _, worker_id = base64.b64decode(token, b"-_", validate=True).decode().partition("\0")
    except (binascii.Error, ValueError):
        return None
    return source_id, worker_id
