"""Spans of calls for OpenTelemetry, if its API is installed; exported if the user asks for it."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from modelexpress_core.installing import install_command
from modelexpress_core.server.settings import SpanSettings
from modelexpress_core.wire.interception import CallScope, Interceptor, status_of
from modelexpress_core.wire.rpc import RpcContext, split_path

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = ["exported_spans", "span_interceptors"]

_log = logging.getLogger(__name__)

#: Name of the service in traces, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES sets another.
_SERVICE_NAME = "modelexpress"

_Code = grpc.StatusCode

#: Statuses that are the server's fault; others are the caller's (OpenTelemetry's conventions for gRPC servers).
_FAULTS = frozenset(
    {
        _Code.UNKNOWN,
        _Code.DEADLINE_EXCEEDED,
        _Code.UNIMPLEMENTED,
        _Code.INTERNAL,
        _Code.UNAVAILABLE,
        _Code.DATA_LOSS,
    }
)

_OTLP = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
}


def span_interceptors() -> Sequence[grpc.aio.ServerInterceptor[Any, Any]]:
    """The interceptor that makes a span of each call; none if the API of OpenTelemetry is not installed."""
    try:
        return (_SpanInterceptor(),)
    except ModuleNotFoundError:
        return ()


class _SpanInterceptor(Interceptor):
    """Makes a span of each call, below the caller's span in its W3C Trace Context."""

    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._tracer = trace.get_tracer("modelexpress_core", version("modelexpress-core"))
        self._propagator = TraceContextTextMapPropagator()

    def scope(self, details: grpc.HandlerCallDetails) -> CallScope | None:
        """The span. Calls of unknown methods have none: callers choose their names."""
        if self._has_no_provider():
            return None
        name = details.method.lstrip("/")
        metadata: Any = details.invocation_metadata or ()
        parent = self._propagator.extract({key: value for key, value in metadata if isinstance(value, str)})
        service, method = split_path(details.method)
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}

        @contextlib.asynccontextmanager
        async def in_span(context: RpcContext) -> AsyncIterator[None]:
            raised: BaseException | None = None
            with self._tracer.start_as_current_span(
                name,
                parent,
                self._trace.SpanKind.SERVER,
                attributes,
                record_exception=False,
                set_status_on_exception=False,  # gRPC ends a call with an exception, too
            ) as span:
                try:
                    yield
                except BaseException as exc:
                    raised = exc
                    raise
                finally:
                    code = status_of(context, raised)
                    span.set_attribute("rpc.grpc.status_code", code.value[0])
                    if code in _FAULTS:
                        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, code.name))

        return in_span

    def _has_no_provider(self) -> bool:
        """Whether the program has set no provider of tracers: spans would go nowhere."""
        return isinstance(self._trace.get_tracer_provider(), self._trace.ProxyTracerProvider)


@contextlib.contextmanager
def exported_spans(settings: SpanSettings) -> Iterator[None]:
    """Export spans within the block, as ``settings`` say; the last ones are sent at its end.

    A provider that the program has set before stays. A failure to export is logged, and stops no server.
    """
    provider = _provider(settings)
    try:
        yield
    finally:
        if provider is not None:
            provider.shutdown()


def _provider(settings: SpanSettings) -> TracerProvider | None:
    """The provider that takes all spans of this process from now on; None if ``settings`` ask for none, or it fails."""
    wanted = [name.lower() for name in settings.exporters] or (["otlp"] if settings.endpoint else [])
    wanted = [name for name in wanted if name != "none"]
    if not wanted:
        return None
    try:
        return _new_provider(wanted, settings.protocol)
    except ModuleNotFoundError as exc:
        _log.warning(
            "no spans are exported: the package %s is missing; %s",
            exc.name,
            install_command("modelexpress-core[otel]"),
        )
    except Exception as exc:  # noqa: BLE001 - of another package, whose text may quote variables
        _log.warning(
            "no spans are exported: OpenTelemetry cannot use a variable that begins with OTEL_ (%s)",
            type(exc).__name__,
        )
    return None


def _new_provider(wanted: Sequence[str], protocol: str) -> TracerProvider | None:
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporters = [exporter for name in wanted if (exporter := _exporter(name, protocol)) is not None]
    if not exporters or not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    found = Resource.create()  # of OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    named = not str(found.attributes.get("service.name", "unknown_service")).startswith("unknown_service")
    ours = Resource({"service.version": version("modelexpress-core"), "service.name": _SERVICE_NAME})
    resource = ours.merge(found) if named else found.merge(ours)
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider


def _exporter(name: str, protocol: str) -> SpanExporter | None:
    """The exporter that ``OTEL_TRACES_EXPORTER`` calls ``name``; None, with a warning, if there is none."""
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name != "otlp" or protocol not in _OTLP:
        variable, value = (
            ("OTEL_TRACES_EXPORTER", name) if name != "otlp" else ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        )
        known = "otlp, console, none" if name != "otlp" else ", ".join(_OTLP)
        _log.warning("no spans are exported: %s names %r; known are %s", variable, value, known)
        return None
    try:
        exporter: SpanExporter = importlib.import_module(_OTLP[protocol]).OTLPSpanExporter()
    except ModuleNotFoundError as exc:
        package = f"opentelemetry-exporter-otlp-proto-{protocol.partition('/')[0]}"
        _log.warning("no spans are exported to a collector: %s is missing; %s", exc.name, install_command(package))
        return None
    except Exception as exc:  # noqa: BLE001 - of another package
        _log.warning("no spans are exported to a collector: its exporter cannot be made (%s)", type(exc).__name__)
        return None
    return exporter
