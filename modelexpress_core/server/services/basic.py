"""``HealthService`` and ``ApiService``: whether the server is there, and how long it has been."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from typing import Any, TypeAlias

import grpc.aio

from modelexpress_core.wire.proto.modelexpress import api_pb2, health_pb2

__all__ = ["ApiService", "HealthService"]

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class HealthService:
    """Tells version and uptime."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._version = version("modelexpress-core")  # read once: probes ask often

    async def get_health(self, _: health_pb2.GetHealthRequest, __: _Context) -> health_pb2.GetHealthResponse:
        """Status is ``"ok"`` whenever this is answered at all."""
        uptime = int(time.monotonic() - self._started)
        return health_pb2.GetHealthResponse(version=self._version, status="ok", uptime=uptime)


class ApiService:
    """Answers pings."""

    async def send_request(self, request: api_pb2.Request, _: _Context) -> api_pb2.Response:
        """``ping`` is the one action there is."""
        if request.action == "ping":
            return api_pb2.Response(success=True, data=json.dumps({"message": "pong"}, separators=(",", ":")).encode())
        return api_pb2.Response(success=False, error=f"Unknown action: {request.action}")
