"""``grpc.health.v1.Health``: what probes of Kubernetes and load balancers ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio

from modelexpress_core.wire.proto.modelexpress import health_pb2
from modelexpress_core.wire.rpc import API, HEALTH, P2P

__all__ = ["StandardHealth"]

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Status = health_pb2.HealthCheckResponse.ServingStatus
_KNOWN = frozenset({"", API.name, HEALTH.name, P2P.name})


class StandardHealth:
    """All services serve, or none: before the server is ready, and while it drains."""

    def __init__(self) -> None:
        self._serving = False
        self._ended = False
        self._changed = asyncio.Condition()

    async def begin(self) -> None:
        """All services serve from now on."""
        async with self._changed:
            self._serving = True
            self._changed.notify_all()

    async def end(self) -> None:
        """None serves any more; whoever watches is told so, and that was all."""
        async with self._changed:
            self._serving, self._ended = False, True
            self._changed.notify_all()

    async def check(self, request: health_pb2.HealthCheckRequest, context: _Context) -> health_pb2.HealthCheckResponse:
        """Whether a service serves now."""
        if request.service not in _KNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service is called {request.service!r}")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def watch(
        self, request: health_pb2.HealthCheckRequest, _: _Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Whether a service serves: now, and whenever that changes."""
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            async with self._changed:
                if self._status(request.service) == told:
                    if self._ended:
                        return
                    await self._changed.wait()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in _KNOWN:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._serving else _Status.NOT_SERVING
