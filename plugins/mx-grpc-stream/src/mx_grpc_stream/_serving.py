"""The worker's side: a gRPC service that streams ranges of tensors to readers with a lease, and opens the bulk channel.

It is the place where a reader learns what is wrong with its request, since the bulk channel says little to strangers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import torch

from modelexpress_core.contracts.transport import TensorTable
from modelexpress_core.transport.tensor_bytes import host_memory
from modelexpress_core.wire.authentication import certificate_names
from modelexpress_core.wire.frames import FRAME_BYTES, frame_of
from modelexpress_core.wire.proto.modelexpress import peer_pb2
from modelexpress_core.wire.rpc import Method, RpcContext, Service
from mx_grpc_stream._bulk import ServedBulk

__all__ = ["TENSORS", "StreamedTensors"]

TENSORS = Service(
    "modelexpress.peer.TensorService",
    {
        "ReadTensors": Method(peer_pb2.ReadTensorsRequest, bytes, response_streaming=True),
        "OpenBulk": Method(peer_pb2.OpenBulkRequest, peer_pb2.OpenBulkResponse),
    },
)

#: Ranges that one call may ask for.
_MAX_RANGES = 1024

_NO_LEASE = "no such lease: it has ended, and the memory may have changed since then"

#: Threads that copy tensors into frames, of all readers together.
_THREADS = 4


class StreamedTensors:
    """Tensors of one worker, streamed until ``close``.

    Args:
        table: The tensors.
        bulk: The bulk channel, closed with this; None if there is none.

    Attributes:
        description: Empty: readers need nothing but the worker's address.
        topology: Empty.
        services: The service.
    """

    description = b""
    topology: Mapping[str, str] = {}

    def __init__(self, table: TensorTable, bulk: ServedBulk | None) -> None:
        self._table = table
        self._bulk = bulk
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="mx-frames")
        self._copying = threading.Condition()
        self._copies = 0
        self._closed = False
        self.services: Mapping[Any, object] = {TENSORS: self}

    async def open_bulk(self, request: peer_pb2.OpenBulkRequest, context: RpcContext) -> peer_pb2.OpenBulkResponse:
        """Give the holder of a lease a ticket."""
        if not self._table.holds_lease(request.lease_id):
            await context.abort(grpc.StatusCode.NOT_FOUND, _NO_LEASE)
        if self._bulk is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the worker offers no bulk channel")
        names = certificate_names(context.auth_context())
        return peer_pb2.OpenBulkResponse(
            port=self._bulk.server.port,
            ticket=self._bulk.ticket(request.lease_id, names[0] if names else ""),
            content=self._bulk.content,
            version=self._bulk.version,
        )

    async def read_tensors(self, request: peer_pb2.ReadTensorsRequest, context: RpcContext) -> AsyncIterator[bytes]:
        """Stream the ranges in the order of the request."""
        if len(request.ranges) > _MAX_RANGES:
            reason = f"{len(request.ranges)} ranges in one call, and {_MAX_RANGES} are allowed"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
        for each in request.ranges:
            memory = self._table.tensors.get(each.name)
            if memory is None or not each.length or each.offset + each.length > len(memory):
                end = each.offset + each.length
                reason = f"there is no tensor {each.name[:200]!r} with bytes {each.offset} to {end - 1}"
                await context.abort(grpc.StatusCode.OUT_OF_RANGE, reason)
        making: Awaitable[bytes | None] | None = None
        part_bytes = 0
        for position, part in self._parts(request):
            begun = self._make_frame(request, position, part)
            if begun is None:
                reason = "the worker no longer offers these tensors"
                await context.abort(grpc.StatusCode.UNAVAILABLE, reason)
            if making is not None:
                yield await self._made(making, context)  # and the next one is made while it is sent
                self._table.count_sent(request.lease_id, part_bytes)
            making, part_bytes = begun, len(part)
        if making is not None:
            yield await self._made(making, context)
            self._table.count_sent(request.lease_id, part_bytes)

    def _parts(self, request: peer_pb2.ReadTensorsRequest) -> Iterator[tuple[int, torch.Tensor]]:
        """What each frame holds: the position of the range, and a part of the tensor."""
        for position, each in enumerate(request.ranges):
            memory, end = self._table.tensors[each.name], each.offset + each.length
            for offset in range(each.offset, end, FRAME_BYTES):
                yield position, memory[offset : min(offset + FRAME_BYTES, end)]

    @staticmethod
    async def _made(making: Awaitable[bytes | None], context: RpcContext) -> bytes:
        frame = await making
        if frame is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, _NO_LEASE)
        return frame

    def _make_frame(
        self, request: peer_pb2.ReadTensorsRequest, position: int, part: torch.Tensor
    ) -> Awaitable[bytes | None] | None:
        """Begin a frame in another thread; None after ``close``."""
        with self._copying:  # a thread that was asked before ``close`` answers: its reader would wait for ever
            if self._closed:
                return None
            return asyncio.get_running_loop().run_in_executor(self._threads, self._frame, request, position, part)

    def _frame(self, request: peer_pb2.ReadTensorsRequest, position: int, part: torch.Tensor) -> bytes | None:
        """A frame with the bytes of ``part``; None unless the lease keeps them as they are."""
        with self._copying:
            if self._closed or not self._table.holds_lease(request.lease_id):
                return None
            self._copies += 1
        try:
            return frame_of(position, host_memory(part.cpu()), checksum=request.checksums)
        finally:
            with self._copying:
                self._copies -= 1
                self._copying.notify_all()

    def close(self) -> None:
        """Stop serving, when the copies and sends under way have ended."""
        if self._bulk is not None:
            self._bulk.server.close()
        with self._copying:
            self._closed = True
            self._copying.wait_for(lambda: not self._copies)
        self._threads.shutdown(wait=False)
