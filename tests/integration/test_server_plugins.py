"""gRPC services of plugins beside the server's own, from a registered plugin to a real call."""

from __future__ import annotations

import asyncio
import doctest
import inspect
import types
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from prometheus_client import Counter

from modelexpress_core import hookimpl, hookspecs
from modelexpress_core.contracts.authenticator import Refusal, RefusedError
from modelexpress_core.contracts.identity import Engine, SourceIdentity
from modelexpress_core.contracts.metadata_store import StoreUnavailableError
from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import (
    AccessDeniedError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    SettingsError,
    UnavailableError,
)
from modelexpress_core.plugins import PluginManager
from modelexpress_core.providers import AuthenticatorProvider, ServerServiceProvider
from modelexpress_core.server.app import Server
from modelexpress_core.server.settings import ServerSettings
from modelexpress_core.server.stores.memory import MemoryStore
from modelexpress_core.settings import from_env
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.identity import own_identity
from modelexpress_core.sources.offering import Offer
from modelexpress_core.sources.worker_client import WorkerClient
from modelexpress_core.storage.memory import store
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.channel import open_channel
from modelexpress_core.wire.client import Security
from modelexpress_core.wire.proto.modelexpress import api_pb2, health_pb2, p2p_pb2
from modelexpress_core.wire.rpc import API, HEALTH, P2P, STANDARD_HEALTH, Service, stub
from modelexpress_core.wire.settings import AuthSettings, TokenSettings
from tests.support.plugins import core_and

_SETTINGS = ServerSettings(host="127.0.0.1", port=0, metrics_port=0, drain_seconds=5.0)

Call = Callable[[grpc.Channel, str], None]


def offering(*records: ServerServiceProvider) -> object:
    """A plugin that offers ``records``."""

    class Plugin:
        @hookimpl
        def mx_register_server_services(self) -> list[ServerServiceProvider]:
            return list(records)

    return Plugin()


def served(call: Call, **plugins: object) -> None:
    """Calls ``call`` with a channel to a server with ``plugins``, and with the address of its metrics."""
    manager = core_and(**plugins)

    def called(server: Server) -> None:
        with open_channel(Endpoint.parse(f"127.0.0.1:{server.port}")) as channel:
            call(channel, f"http://127.0.0.1:{server.metrics_port}/metrics")

    async def serve() -> None:
        async with Server(_SETTINGS, MemoryStore(), manager, environ={"ACME": "1"}) as server:
            await asyncio.to_thread(called, server)

    asyncio.run(serve())


def nothing(channel: grpc.Channel, metrics: str) -> None:
    pytest.fail("the server started")


def metrics_at(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_the_example_is_served() -> None:
    """The example of the hook, which asks the server's store; its health and its calls are reported like others."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(hookspecs.mx_register_server_services) or "")
    plugin = types.ModuleType("example")
    exec("".join(part.source for part in examples), vars(plugin))
    counted = []

    def call(channel: grpc.Channel, metrics: str) -> None:
        count = channel.unary_unary("/acme.audit.AuditService/Count")
        counted.append(count(b"", timeout=10))
        request = p2p_pb2.PublishMetadataRequest(identity={"model_name": "m"}, worker_id="w", worker={})
        stub(P2P, channel)["PublishMetadata"](request, timeout=10)
        counted.append(count(b"", timeout=10))
        check = stub(STANDARD_HEALTH, channel)["Check"]
        health = check(health_pb2.HealthCheckRequest(service="acme.audit.AuditService"), timeout=10)

        assert health_pb2.HealthCheckResponse.SERVING == health.status
        line = 'mx_server_rpcs_total{code="OK",method="Count",service="acme.audit.AuditService"} 2.0'
        assert line in metrics_at(metrics)

    served(call, mx_acme=plugin)

    assert [b"0", b"1"] == counted


class Servicer:
    async def one(self, request: bytes, rpc: Any) -> bytes:
        return request

    async def many(self, request: bytes, rpc: Any) -> Any:
        for _ in range(3):
            yield request

    async def written(self, request: bytes, rpc: Any) -> None:
        await rpc.write(request)

    async def taken(self, requests: Any, rpc: Any) -> bytes:
        return b"".join([request async for request in requests])

    async def both(self, requests: Any, rpc: Any) -> Any:
        async for request in requests:
            yield request

    async def refuse(self, request: bytes, rpc: Any) -> Any:
        yield request
        await rpc.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now")

    async def fail(self, request: bytes, rpc: Any) -> Any:
        yield request
        raise ValueError(request)

    async def fail_at_the_store(self, request: bytes, rpc: Any) -> Any:
        yield request
        raise StoreUnavailableError


def all_sorts(context: ServiceContext) -> Any:
    """A service with a method of each sort, made as code that protoc generated makes it."""

    def add_to_server(servicer: Servicer, server: Any) -> None:
        handlers = {
            "One": grpc.unary_unary_rpc_method_handler(servicer.one),
            "Many": grpc.unary_stream_rpc_method_handler(servicer.many),
            "Written": grpc.unary_stream_rpc_method_handler(servicer.written),
            "Taken": grpc.stream_unary_rpc_method_handler(servicer.taken),
            "Both": grpc.stream_stream_rpc_method_handler(servicer.both),
            "Refuse": grpc.unary_stream_rpc_method_handler(servicer.refuse),
            "Fail": grpc.unary_stream_rpc_method_handler(servicer.fail),
            "FailAtTheStore": grpc.unary_stream_rpc_method_handler(servicer.fail_at_the_store),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("acme.All", handlers),))
        server.add_registered_method_handlers("acme.All", handlers)

    assert "1" == context.settings["ACME"]
    return context.handler(add_to_server, Servicer())


def test_calls_of_every_sort(caplog: pytest.LogCaptureFixture) -> None:
    """Are answered, logged and counted; an exception is told as INTERNAL, without what it says."""
    caplog.set_level("DEBUG", "modelexpress_core.server")

    def call(channel: grpc.Channel, metrics: str) -> None:
        assert b"a" == channel.unary_unary("/acme.All/One")(b"a", timeout=10)
        assert [b"a"] * 3 == list(channel.unary_stream("/acme.All/Many")(b"a", timeout=10))
        assert [b"a"] == list(channel.unary_stream("/acme.All/Written")(b"a", timeout=10))
        assert b"ab" == channel.stream_unary("/acme.All/Taken")(iter([b"a", b"b"]), timeout=10)
        assert [b"a", b"b"] == list(channel.stream_stream("/acme.All/Both")(iter([b"a", b"b"]), timeout=10))
        for method, code in (
            ("Refuse", "FAILED_PRECONDITION"),
            ("Fail", "INTERNAL"),
            ("FailAtTheStore", "UNAVAILABLE"),
        ):
            answers = channel.unary_stream(f"/acme.All/{method}")(b"hunter2", timeout=10)
            assert b"hunter2" == next(answers)
            with pytest.raises(grpc.RpcError) as raised:
                next(answers)
            assert code == raised.value.code().name
            assert "hunter2" not in str(raised.value.details())
        measured = metrics_at(metrics)
        for method, code in (("One", "OK"), ("Many", "OK"), ("Taken", "OK"), ("Both", "OK"), ("Fail", "INTERNAL")):
            assert f'mx_server_rpcs_total{{code="{code}",method="{method}",service="acme.All"}} 1.0' in measured

    served(call, mx_acme=offering(ServerServiceProvider("acme.All", all_sorts)))

    logged = {vars(record)["method"]: vars(record)["code"] for record in caplog.records if hasattr(record, "method")}
    assert {"Many": "OK", "Both": "OK", "Fail": "INTERNAL"}.items() <= logged.items()
    assert ["/acme.All/Fail failed"] == [
        record.getMessage() for record in caplog.records if record.levelname == "ERROR"
    ]


def test_what_is_opened_is_closed_at_the_end() -> None:
    """After the last call, and before the store is."""
    told = []

    def make(context: ServiceContext) -> Any:
        async def close() -> None:
            told.append(await context.store.counts())

        context.closing.push_async_callback(close)
        return grpc.method_handlers_generic_handler("acme.A", {})

    served(lambda channel, metrics: told.append("serving"), mx_acme=offering(ServerServiceProvider("acme.A", make)))

    assert ["serving", {}] == told


def test_a_plugin_answers_under_its_name_alone() -> None:
    """A handler that takes every call gets those of its service."""

    class Everything(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
            async def answer(request: bytes, rpc: Any) -> bytes:
                return b"mine"

            return grpc.unary_unary_rpc_method_handler(answer)

    def call(channel: grpc.Channel, metrics: str) -> None:
        assert b"mine" == channel.unary_unary("/acme.A/Anything")(b"", timeout=10)
        for path in ("/acme.AB/Anything", f"/{P2P.name}/Nothing"):
            with pytest.raises(grpc.RpcError) as raised:
                channel.unary_unary(path)(b"", timeout=10)
            assert grpc.StatusCode.UNIMPLEMENTED == raised.value.code()

    served(call, mx_acme=offering(ServerServiceProvider("acme.A", lambda context: Everything())))


def raising(error: Exception) -> Callable[[ServiceContext], Any]:
    def make(context: ServiceContext) -> Any:
        raise error

    return make


def handler(name: str) -> Callable[[ServiceContext], Any]:
    return lambda context: grpc.method_handlers_generic_handler(name, {})


@pytest.mark.parametrize(
    ("record", "error", "said"),
    [
        (ServerServiceProvider("acme.A", raising(ValueError("no reason"))), PluginLoadError, "ValueError: no reason"),
        (
            ServerServiceProvider("acme.A", raising(SettingsError("ACME=2", hint="set ACME=1"))),
            PluginLoadError,
            "ACME=2\nNext step: set ACME=1",
        ),
        (ServerServiceProvider("acme.A", raising(ModuleNotFoundError("No module x"))), PluginLoadError, "No module x"),
        (ServerServiceProvider("acme.A", lambda context: None), PluginLoadError, "NoneType, which is no grpc."),
        (ServerServiceProvider("acme.A", handler("acme.B")), PluginLoadError, "what answers for acme.B"),
        (ServerServiceProvider("acme/A", handler("acme/A")), PluginLoadError, "no full name"),
        (ServerServiceProvider(P2P.name, handler(P2P.name)), PluginConflictError, "the server itself has already"),
        (
            ServerServiceProvider(STANDARD_HEALTH.name, handler(STANDARD_HEALTH.name)),
            PluginConflictError,
            "the server itself has already",
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_cannot_be_served_stops_the_server(
    record: ServerServiceProvider, error: type[PluginError], said: str
) -> None:
    """With a message that names the plugin and the service."""
    with pytest.raises(error) as raised:
        served(nothing, mx_acme=offering(record))

    assert "mx-acme" == raised.value.plugin
    for part in ("mx-acme", record.name, said):
        assert part in str(raised.value)


def test_two_plugins_with_one_service() -> None:
    """Are both named."""
    one, other = (offering(ServerServiceProvider("acme.A", handler("acme.A"))) for _ in range(2))
    with pytest.raises(PluginConflictError, match=r"mx-b offers the service acme\.A, which mx-a has already"):
        served(nothing, mx_a=one, mx_b=other)


def test_the_servers_own_services_are_cores(tmp_path: Path) -> None:
    """They are registered by the hook: a server without core's plugin has the standard health service alone."""
    health = stub_call(STANDARD_HEALTH, "Check", health_pb2.HealthCheckRequest())

    async def serve() -> None:
        async with Server(_SETTINGS, MemoryStore(), PluginManager()) as server:
            await asyncio.to_thread(called, server.port)

    def called(port: int) -> None:
        with open_channel(Endpoint("127.0.0.1", port)) as channel:
            assert health_pb2.HealthCheckResponse.SERVING == health(channel).status
            for service, method, request in _OWN_CALLS:
                with pytest.raises(grpc.RpcError) as raised:
                    stub_call(service, method, request)(channel)
                assert grpc.StatusCode.UNIMPLEMENTED == raised.value.code()

    asyncio.run(serve())
    served(
        lambda channel, metrics: [
            stub_call(service, method, request)(channel) for service, method, request in _OWN_CALLS
        ]
    )


_OWN_CALLS: list[tuple[Service, str, Any]] = [
    (HEALTH, "GetHealth", health_pb2.GetHealthRequest()),
    (API, "SendRequest", api_pb2.Request(action="ping")),
    (P2P, "ListSources", p2p_pb2.ListSourcesRequest()),
]


def stub_call(service: Service, method: str, request: Any) -> Callable[[grpc.Channel], Any]:
    return lambda channel: stub(service, channel)[method](request, timeout=10)


@pytest.mark.parametrize("service", [HEALTH, API, P2P, STANDARD_HEALTH], ids=lambda service: service.name)
def test_a_plugin_cannot_take_the_name_of_an_own_service(service: Service) -> None:
    """Whatever the order in which plugins come."""
    taken = ServerServiceProvider(service.name, handler(service.name))
    for name in ("aa", "zz"):
        with pytest.raises(PluginConflictError, match="the server itself has already") as raised:
            served(nothing, **{name: offering(taken)})
        assert name == raised.value.plugin


def test_a_service_uses_its_context() -> None:
    """The server's settings wherever they were set, other plugins, and metrics that the server shows."""
    seen: dict[str, Any] = {}

    def make(context: ServiceContext) -> Any:
        seen["settings"] = from_env(ServerSettings, context.settings)
        seen["own"] = context.settings["ACME"]
        opened = Counter("acme_opened", "Storages opened.", registry=context.metrics)

        async def read(request: bytes, rpc: Any) -> bytes:
            uri = context.plugins.rewrite_uri(ModelURI.parse(request.decode()))
            storage = context.plugins.storage(uri, context.settings)
            opened.inc()
            try:
                return "\n".join(info.path for info in storage.list(uri.path)).encode()
            finally:
                storage.close()

        handlers = {"Read": grpc.unary_unary_rpc_method_handler(read)}
        return grpc.method_handlers_generic_handler("acme.A", handlers)

    class Rewriting:
        @hookimpl
        def mx_rewrite_uri(self, uri: ModelURI) -> ModelURI | None:
            return ModelURI("memory", "shelf", "a") if uri.scheme == "shelf" else None

    def call(channel: grpc.Channel, metrics: str) -> None:
        seen["read"] = channel.unary_unary("/acme.A/Read")(b"shelf://a", timeout=10)
        assert "acme_opened_total 1.0" in metrics_at(metrics)

    store("shelf").put("a/x.txt", b"x")
    served(call, mx_acme=offering(ServerServiceProvider("acme.A", make)), mx_shelf=Rewriting())

    assert _SETTINGS == seen["settings"]
    assert ("1", b"a/x.txt") == (seen["own"], seen["read"])


# -- authenticators of plugins -----------------------------------------------------------------------------------------


class Doorbell:
    by_certificate = False

    async def authenticate(self, call: Any) -> str:
        if call.token != "knock-knock":
            raise RefusedError(Refusal.PERMISSION_DENIED, "nobody is at home")
        return "visitor"


def authenticating(factory: Callable[[Mapping[str, str]], Any], *, name: str = "doorbell") -> object:
    """A plugin that offers an authenticator."""

    class Plugin:
        @hookimpl
        def mx_register_authenticators(self) -> list[AuthenticatorProvider]:
            return [AuthenticatorProvider(name, factory)]

    return Plugin()


def authenticated(mode: str, call: Callable[[Server], None], **plugins: object) -> None:
    async def serve() -> None:
        settings = ServerSettings(host="127.0.0.1", port=0, metrics_port=0, health_port=0, drain_seconds=5.0)
        auth = AuthSettings(mode=mode)
        async with Server(settings, MemoryStore(), core_and(**plugins), auth=auth, environ={"ACME": "1"}) as server:
            await asyncio.to_thread(call, server)

    asyncio.run(serve())


def test_an_authenticator_of_a_plugin_decides_who_is_answered(tmp_path: Path) -> None:
    """Its records belong to the name that it gives; health answers everybody; its factory gets the settings."""
    environs: list[Mapping[str, str]] = []

    def make(environ: Mapping[str, str]) -> Doorbell:
        environs.append(environ)
        return Doorbell()

    def call(server: Server) -> None:
        (tmp_path / "token").write_text("knock-knock")
        with client(server.port, tmp_path / "token") as visitor:
            published = visitor.publish(SourceIdentity("m"), p2p_pb2.WorkerMetadata(), "w")
            assert published.success
            assert ["w"] == [source.worker_id for source in visitor.list_sources()]
        with client(server.port, tmp_path / "none") as stranger:
            assert "ok" == stranger.health().status
            with pytest.raises(AccessDeniedError, match="nobody is at home"):
                stranger.list_sources()
        with client(server.health_port, tmp_path / "none") as probe:
            assert "ok" == probe.health().status

    authenticated("doorbell", call, mx_acme=authenticating(make))

    assert ["1"] == [environ["ACME"] for environ in environs]
    assert ["doorbell"] == [environ["MX_AUTH_MODE"] for environ in environs]


def client(port: int, token: Path) -> ServerClient:
    security = Security(token=TokenSettings(str(token)))
    return ServerClient(f"127.0.0.1:{port}", security=security)


@pytest.mark.parametrize(
    ("mode", "factory", "error", "said"),
    [
        ("wrong", lambda environ: Doorbell(), SettingsError, "installed: doorbell, mtls, token"),
        ("doorbell", lambda environ: None, PluginLoadError, "which is no authenticator"),
        ("doorbell", lambda environ: types.SimpleNamespace(authenticate=print), PluginLoadError, "by_certificate"),
        ("doorbell", lambda environ: 1 / 0, PluginLoadError, "ZeroDivisionError"),
    ],
    ids=["unknown", "nothing", "half", "raises"],
)
def test_an_authenticator_that_cannot_be_used_stops_the_server(
    mode: str, factory: Callable[[Mapping[str, str]], Any], error: type[Exception], said: str
) -> None:
    """Nobody is answered in its stead."""
    with pytest.raises(error, match=said):
        authenticated(mode, lambda server: pytest.fail("the server started"), mx_acme=authenticating(factory))


def test_one_that_authenticates_by_certificate_needs_tls() -> None:
    """Else TLS would verify none."""
    by_certificate = types.SimpleNamespace(authenticate=print, by_certificate=True)
    with pytest.raises(SettingsError, match="MX_TLS_CA_PATH and MX_TLS_CERT_PATH are not set"):
        authenticated("doorbell", lambda server: None, mx_acme=authenticating(lambda environ: by_certificate))


def test_a_mode_that_is_offered_twice_names_both() -> None:
    """A plugin cannot take the place of a mode of core's."""
    with pytest.raises(PluginConflictError, match="modelexpress-core and mx-acme"):
        authenticated("mtls", lambda server: None, mx_acme=authenticating(lambda environ: Doorbell(), name="mtls"))


def test_a_worker_asks_for_grants_where_a_plugin_authenticates_by_token() -> None:
    """Readers send their token to the server alone, so the plugin could name none of them."""
    weights = {"w": torch.zeros(4)}
    identity = own_identity("m", weights, engine=Engine.VLLM, engine_version="1")
    environ = {"MX_AUTH_MODE": "doorbell", "MX_WORKER_GRPC_PORT": "0", "MX_WORKER_HOST": "127.0.0.1"}
    plugins = core_and(mx_acme=authenticating(lambda environ: Doorbell()))

    with (
        Offer(identity, weights, transports=[], environ=environ, plugins=plugins) as offer,
        WorkerClient(offer.endpoint) as reader,
        pytest.raises(UnavailableError, match="not yet been published"),
    ):
        reader.manifest(identity.source_id)
