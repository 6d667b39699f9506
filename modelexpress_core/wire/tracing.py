"""The trace context of outgoing calls: ``traceparent`` of W3C Trace Context."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import grpc
from attrs import frozen

__all__ = ["with_trace_context"]


def with_trace_context(channel: grpc.Channel) -> grpc.Channel:
    """``channel``, with the current span of OpenTelemetry in the metadata of each call, if there is one.

    This does not import OpenTelemetry: in a program that has not imported it, no span is current.
    """
    return grpc.intercept_channel(channel, _TraceContext())


@frozen
class _Details(grpc.ClientCallDetails):
    """What gRPC passes to interceptors about a call."""

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _TraceContext(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]  # generic in the annotations alone
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    def _intercept(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:  # noqa: ANN401 - of gRPC
        carrier = _carrier()
        if not carrier:
            return continuation(details, request)
        with_span = _Details(
            details.method,
            details.timeout,
            (*(details.metadata or ()), *carrier.items()),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
        return continuation(with_span, request)

    intercept_unary_unary: Any = _intercept
    intercept_unary_stream: Any = _intercept
    intercept_stream_unary: Any = _intercept
    intercept_stream_stream: Any = _intercept


def _carrier() -> dict[str, str]:
    """Metadata for the current span; empty if there is none."""
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier
