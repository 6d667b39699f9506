"""``HealthService`` and ``ApiService``: version and uptime of the server, and pings."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from typing import Any

import grpc

from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.wire.proto.modelexpress import api_pb2, health_pb2
from modelexpress_core.wire.rpc import API, HEALTH, RpcContext, handler

__all__ = ["ApiService", "HealthService", "make_api", "make_health"]


def make_health(_: ServiceContext) -> grpc.GenericRpcHandler[Any, Any]:
    """The handler of ``HealthService``."""
    return handler(HEALTH, HealthService())


def make_api(_: ServiceContext) -> grpc.GenericRpcHandler[Any, Any]:
    """The handler of ``ApiService``."""
    return handler(API, ApiService())


class HealthService:
    """Answers with version and uptime."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._version = version("modelexpress-core")  # read once: probes ask often

    async def get_health(self, _: health_pb2.GetHealthRequest, __: RpcContext) -> health_pb2.GetHealthResponse:
        """The status is always ``"ok"``."""
        uptime = int(time.monotonic() - self._started)
        return health_pb2.GetHealthResponse(version=self._version, status="ok", uptime=uptime)


class ApiService:
    """Answers pings."""

    async def send_request(self, request: api_pb2.Request, _: RpcContext) -> api_pb2.Response:
        """The only action is ``ping``."""
        if request.action == "ping":
            return api_pb2.Response(success=True, data=json.dumps({"message": "pong"}, separators=(",", ":")).encode())
        return api_pb2.Response(success=False, error=f"Unknown action: {request.action}")
