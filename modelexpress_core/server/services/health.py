"""``grpc.health.v1.Health``, which Kubernetes and load balancers probe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
import grpc.aio

from modelexpress_core.wire.proto.modelexpress import health_pb2
from modelexpress_core.wire.rpc import RpcContext

__all__ = ["StandardHealth"]

_Status = health_pb2.HealthCheckResponse.ServingStatus


class StandardHealth:
    """All services serve, or none does: before the server is ready, and while it drains.

    Args:
        services: Full names of the services; the empty name stands for the whole server.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._known = frozenset({"", *services})
        self._serving = False
        self._ended = False
        self._changed = asyncio.Condition()

    async def begin(self) -> None:
        """All services serve from now on."""
        async with self._changed:
            self._serving = True
            self._changed.notify_all()

    async def end(self) -> None:
        """No service serves any more; watchers get this status, and their streams end."""
        async with self._changed:
            self._serving, self._ended = False, True
            self._changed.notify_all()

    async def check(
        self, request: health_pb2.HealthCheckRequest, context: RpcContext
    ) -> health_pb2.HealthCheckResponse:
        """Whether a service serves now."""
        if request.service not in self._known:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service is called {request.service!r}")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def watch(
        self, request: health_pb2.HealthCheckRequest, _: RpcContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Whether a service serves, now and at each change."""
        sent = None
        while True:
            status = self._status(request.service)
            if status != sent:
                sent = status
                yield health_pb2.HealthCheckResponse(status=status)
            async with self._changed:
                if self._status(request.service) == sent:
                    if self._ended:
                        return
                    await self._changed.wait()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in self._known:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._serving else _Status.NOT_SERVING
