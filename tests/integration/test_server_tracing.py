"""Spans of a server's calls: in this process, below those of the caller, and as `mx serve` exports them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from modelexpress_core import hookimpl
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.installing import install_command
from modelexpress_core.providers import ServerServiceProvider
from modelexpress_core.server.app import Server
from modelexpress_core.server.settings import ServerSettings
from modelexpress_core.server.stores.memory import MemoryStore
from modelexpress_core.wire.channel import open_channel
from modelexpress_core.wire.proto.modelexpress import health_pb2, p2p_pb2
from modelexpress_core.wire.rpc import HEALTH, P2P, STANDARD_HEALTH, stub
from tests.support.plugins import core_and
from tests.support.serving import Serving
from tests.support.waiting import eventually

Start = Callable[..., Serving]

#: What a caller tells of its span, and the two ids in it.
_TRACE, _SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
_TRACEPARENT = ("traceparent", f"00-{_TRACE}-{_SPAN}-01")


@pytest.fixture(scope="module")
def exporter() -> Iterator[InMemorySpanExporter]:
    """What keeps the spans of this process, whose provider can be set once."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Callable[[Callable[[str], None]], dict[str, ReadableSpan]]:
    """Calls a function with the address of a server in this process; the spans of that time, by name."""

    class Plugin:
        @hookimpl
        def mx_register_server_services(self) -> list[ServerServiceProvider]:
            return [ServerServiceProvider("acme.Failing", _failing)]

    async def serve(call: Callable[[str], None]) -> None:
        settings = ServerSettings(host="127.0.0.1", port=0, metrics_port=0, drain_seconds=5.0)
        async with Server(settings, MemoryStore(), core_and(mx_acme=Plugin())) as server:
            await asyncio.to_thread(call, f"127.0.0.1:{server.port}")

    def spans(call: Callable[[str], None]) -> dict[str, ReadableSpan]:
        exporter.clear()
        asyncio.run(serve(call))
        return {span.name: span for span in exporter.get_finished_spans()}

    return spans


def _failing(context: object) -> Any:
    async def fail(request: bytes, rpc: object) -> bytes:
        raise ValueError

    async def fail_later(request: bytes, rpc: object) -> Any:
        yield request
        raise ValueError

    handlers = {
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
        "FailLater": grpc.unary_stream_rpc_method_handler(fail_later),
    }
    return grpc.method_handlers_generic_handler("acme.Failing", handlers)


def test_a_call_has_a_span_below_that_of_the_caller(spans: Any) -> None:
    """Told as W3C Trace Context has it by a client of any sort."""

    def call(address: str) -> None:
        with open_channel(Endpoint.parse(address)) as channel:
            stub(P2P, channel)["ListSources"](p2p_pb2.ListSourcesRequest(), timeout=10, metadata=(_TRACEPARENT,))

    span = spans(call)["model_express.p2p.P2pService/ListSources"]

    assert trace.SpanKind.SERVER == span.kind
    assert (int(_TRACE, 16), int(_SPAN, 16)) == (span.context.trace_id, span.parent.span_id)
    assert span.parent.is_remote
    assert {
        "rpc.system": "grpc",
        "rpc.service": "model_express.p2p.P2pService",
        "rpc.method": "ListSources",
        "rpc.grpc.status_code": 0,
    } == dict(span.attributes)
    assert trace.StatusCode.UNSET == span.status.status_code


def test_our_client_tells_its_span(spans: Any) -> None:
    """Where there is one: calls outside have no parent."""

    def call(address: str) -> None:
        with open_channel(Endpoint.parse(address)) as channel:
            health, standard = stub(HEALTH, channel), stub(STANDARD_HEALTH, channel)
            with trace.get_tracer("test").start_as_current_span("load"):
                given = (("x-kept", "1"),)
                health["GetHealth"](health_pb2.GetHealthRequest(), timeout=10, metadata=given)
                watch = standard["Watch"](health_pb2.HealthCheckRequest(), timeout=10)
                next(watch)
                watch.cancel()
            standard["Check"](health_pb2.HealthCheckRequest(), timeout=10)

    found = spans(call)

    above = found["load"].context
    for name in ("model_express.health.HealthService/GetHealth", "grpc.health.v1.Health/Watch"):
        assert (above.trace_id, above.span_id) == (found[name].context.trace_id, found[name].parent.span_id)
    assert found["grpc.health.v1.Health/Check"].parent is None


@pytest.mark.parametrize("metadata", [("traceparent", "nonsense"), ("traceparent", ""), ("x-bin", b"\xff")])
def test_what_is_no_parent_is_none(spans: Any, metadata: tuple[str, str | bytes]) -> None:
    """The call is answered, and its span has no parent."""

    def call(address: str) -> None:
        with open_channel(Endpoint.parse(address)) as channel:
            stub(HEALTH, channel)["GetHealth"](health_pb2.GetHealthRequest(), timeout=10, metadata=(metadata,))

    assert spans(call)["model_express.health.HealthService/GetHealth"].parent is None


def test_faults_of_the_server_make_a_span_an_error(spans: Any) -> None:
    """In calls of every sort; what the caller did wrong does not."""

    def call(address: str) -> None:
        with open_channel(Endpoint.parse(address)) as channel:
            for path, many in (("/acme.Failing/Fail", False), ("/acme.Failing/FailLater", True)):
                with pytest.raises(grpc.RpcError) as raised:
                    list(channel.unary_stream(path)(b"", timeout=10)) if many else channel.unary_unary(path)(b"")
                assert grpc.StatusCode.INTERNAL == raised.value.code()
            with pytest.raises(grpc.RpcError):
                stub(STANDARD_HEALTH, channel)["Check"](health_pb2.HealthCheckRequest(service="no"), timeout=10)

    found = spans(call)

    for name in ("acme.Failing/Fail", "acme.Failing/FailLater"):
        assert trace.StatusCode.ERROR == found[name].status.status_code
        assert grpc.StatusCode.INTERNAL.value[0] == found[name].attributes["rpc.grpc.status_code"]
    check = found["grpc.health.v1.Health/Check"]
    assert trace.StatusCode.UNSET == check.status.status_code
    assert grpc.StatusCode.NOT_FOUND.value[0] == check.attributes["rpc.grpc.status_code"]


def test_a_client_that_goes_ends_the_span(spans: Any, exporter: InMemorySpanExporter) -> None:
    """As CANCELLED, in the middle of a stream that nobody reads to its end."""

    def call(address: str) -> None:
        with open_channel(Endpoint.parse(address)) as channel:
            watch = stub(STANDARD_HEALTH, channel)["Watch"](health_pb2.HealthCheckRequest(), timeout=10)
            next(watch)
            watch.cancel()
        # A server that stops before it hears of the cancellation ends the stream as OK.
        eventually(exporter.get_finished_spans)

    span = spans(call)["grpc.health.v1.Health/Watch"]

    assert grpc.StatusCode.CANCELLED.value[0] == span.attributes["rpc.grpc.status_code"]


# -- what `mx serve` exports -------------------------------------------------------------------------------------------


def called(serving: Serving) -> None:
    with open_channel(Endpoint.parse(serving.url)) as channel:
        stub(HEALTH, channel)["GetHealth"](health_pb2.GetHealthRequest(), timeout=10, metadata=(_TRACEPARENT,))


def printed(text: str) -> list[dict[str, Any]]:
    """The objects that stand one after the other in ``text``."""
    decoder, found = json.JSONDecoder(), []
    while text.strip():
        value, end = decoder.raw_decode(text.lstrip())
        found.append(value)
        text = text.lstrip()[end:]
    return found


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "modelexpress"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=ours,team=a"}, "ours"),
    ],
)
def test_the_console(start: Start, environ: dict[str, str], name: str) -> None:
    """Has every span once the server has ended, with the service's name."""
    serving = start(OTEL_TRACES_EXPORTER="console", **environ)
    called(serving)

    [span] = printed(serving.ended()[0])

    assert ("model_express.health.HealthService/GetHealth", "SpanKind.SERVER") == (span["name"], span["kind"])
    assert (f"0x{_TRACE}", f"0x{_SPAN}") == (span["context"]["trace_id"], span["parent_id"])
    assert name == span["resource"]["attributes"]["service.name"]


@pytest.mark.parametrize("environ", [{}, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:1"}])
def test_nothing_is_exported_where_nobody_asks(start: Start, environ: dict[str, str]) -> None:
    """No span, and no word."""
    serving = start(**environ)
    called(serving)

    printed_, said = serving.ended()
    assert "" == printed_
    assert "span" not in said


_HIDING = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(HIDDEN):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def run_without(hidden: str, program: str, **environ: str) -> str:
    """What a program logs where the packages ``hidden`` are not installed."""
    code = _HIDING.replace("HIDDEN", repr(hidden)) + program
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    return done.stderr


_EXPORTING = """
from modelexpress_core.server.settings import LogSettings, SpanSettings
from modelexpress_core.server.logs import write_log
from modelexpress_core.settings import from_env
from modelexpress_core.server.tracing import exported_spans, span_interceptors
write_log(LogSettings())
with exported_spans(from_env(SpanSettings)):
    assert INTERCEPTORS == len(span_interceptors())
"""


@pytest.mark.parametrize(
    ("hidden", "environ", "said"),
    [
        (
            "opentelemetry.exporter",
            {"OTEL_TRACES_EXPORTER": "otlp"},
            "pip install 'opentelemetry-exporter-otlp-proto-grpc'",
        ),
        (
            "opentelemetry.exporter",
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://u:hunter2@h", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "pip install 'opentelemetry-exporter-otlp-proto-http'",
        ),
        (
            "opentelemetry",
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://u:hunter2@h"},
            install_command("modelexpress-core[otel]"),
        ),
        ("none", {"OTEL_TRACES_EXPORTER": "zipkin"}, "'zipkin'; known are otlp, console, none"),
        (
            "none",
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
            "'http/json'; known are",
        ),
        (
            "none",
            {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "99999"},
            "no spans are exported",
        ),
        ("none", {"OTEL_TRACES_EXPORTER": "console", "OTEL_ATTRIBUTE_COUNT_LIMIT": "hunter2"}, "no spans are exported"),
        ("none", {"OTEL_TRACES_EXPORTER": "none,None"}, ""),
        ("opentelemetry", {}, ""),
    ],
)
def test_what_keeps_spans_from_being_exported(hidden: str, environ: dict[str, str], said: str) -> None:
    """Is a warning that says what to install or to correct, and the server goes on."""
    program = _EXPORTING.replace("INTERCEPTORS", "0" if hidden == "opentelemetry" else "1")

    logged = run_without(hidden, program, **environ)

    assert said in logged
    assert bool(said) == bool(logged)
    assert "hunter2" not in logged


def test_none_among_others_counts_for_nothing(start: Start) -> None:
    """The others are exported to, without a word."""
    serving = start(OTEL_TRACES_EXPORTER="none,console")
    called(serving)

    printed_, said = serving.ended()
    assert 1 == len(printed(printed_))
    assert "OTEL" not in said


def test_a_provider_that_is_there_stays() -> None:
    """Whoever embeds the server, or instruments it, has set it up."""
    program = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from modelexpress_core.server.settings import SpanSettings
from modelexpress_core.server.tracing import exported_spans
mine = TracerProvider()
trace.set_tracer_provider(mine)
with exported_spans(SpanSettings(exporters=("console",))):
    assert trace.get_tracer_provider() is mine
    with trace.get_tracer("x").start_as_current_span("x"):
        pass
"""

    assert "" == run_without("none", program)


def test_a_client_imports_nothing_for_it() -> None:
    """In a program without OpenTelemetry, calls are what they were."""
    program = """
import grpc, sys
from modelexpress_core.wire.tracing import with_trace_context
with with_trace_context(grpc.insecure_channel("127.0.0.1:1")) as channel:
    try:
        channel.unary_unary("/a/B")(b"", timeout=1)
    except grpc.RpcError:
        pass
assert "opentelemetry" not in sys.modules
"""

    assert "" == run_without("none", program)
