"""The server: its services, its store, its reaper, from the first port to the last call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from types import TracebackType

import grpc.aio
from prometheus_client import start_http_server

from modelexpress_core.contracts.metadata_store import MetadataStore, StoreUnavailableError
from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.providers import ServerServiceProvider
from modelexpress_core.server.calls import LoggedCalls
from modelexpress_core.server.interceptors import Observed
from modelexpress_core.server.metrics import ServerMetrics
from modelexpress_core.server.reaper import Reaper
from modelexpress_core.server.services.basic import ApiService, HealthService
from modelexpress_core.server.services.health import StandardHealth
from modelexpress_core.server.services.p2p import P2pService
from modelexpress_core.server.services.plugins import PluginServices
from modelexpress_core.server.settings import ServerSettings
from modelexpress_core.server.stores.measured import MeasuredStore
from modelexpress_core.server.tracing import span_interceptors
from modelexpress_core.uri import host_and_port
from modelexpress_core.wire.rpc import API, HEALTH, P2P, STANDARD_HEALTH, Service
from modelexpress_core.wire.serving import listen, new_server
from modelexpress_core.wire.settings import AuthSettings, TlsSettings

__all__ = ["Server"]

_log = logging.getLogger(__name__)


class Server:
    """Serves within its ``async with`` block; at its end, calls that are under way may end first.

    Args:
        settings: How to run.
        store: Where metadata is kept; closed at the end.
        tls: Files of TLS, which is spoken where there is a certificate among them.
        auth: Whose calls are answered.
        services: What plugins offer beside the server's own services, each with its distribution.
        environ: Variables, for their factories.

    Attributes:
        port: Where the gRPC services are.
        health_port: Where those of health are, without TLS; 0 where that is not asked for.
        metrics_port: Where the metrics are.
    """

    def __init__(
        self,
        settings: ServerSettings,
        store: MetadataStore,
        *,
        tls: TlsSettings | None = None,
        auth: AuthSettings | None = None,
        services: Iterable[tuple[str, ServerServiceProvider]] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = settings
        self._tls = tls or TlsSettings()
        self._auth = auth or AuthSettings()
        self._metrics = ServerMetrics()
        self._store = MeasuredStore(store, self._metrics)
        self._services: dict[Service, object] = {
            HEALTH: HealthService(),
            API: ApiService(),
            P2P: P2pService(self._store, settings.heartbeat_timeout_seconds),
        }
        own = [service.name for service in self._services]
        self._plugin_services = PluginServices(services, {*own, STANDARD_HEALTH.name})
        self._environ = environ or {}
        self._health = StandardHealth([*own, *self._plugin_services.names])
        self._closing = contextlib.AsyncExitStack()
        self.port = 0
        self.health_port = 0
        self.metrics_port = 0

    async def __aenter__(self) -> Server:
        async with contextlib.AsyncExitStack() as opened:
            opened.push_async_callback(self._store.close)
            await self._serve_metrics(opened)
            await self._serve(opened)
            await self._serve_health(opened)
            for task in (self._reaper().run(), self._count()):
                running = asyncio.ensure_future(task)
                opened.callback(running.cancel)
            await self._health.begin()
            opened.push_async_callback(self._health.end)
            self._closing = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._closing.aclose()

    async def _serve(self, opened: contextlib.AsyncExitStack) -> None:
        # From the outermost to the innermost: what happens within a call is part of its span, and of its line.
        interceptors = [*span_interceptors(), LoggedCalls(), Observed(self._metrics)]
        services = {**self._services, STANDARD_HEALTH: self._health}
        closing = await opened.enter_async_context(contextlib.AsyncExitStack())
        others = self._plugin_services.make(ServiceContext(self._store, self._environ, closing))
        server = new_server(services, auth=self._auth, interceptors=interceptors, others=others)
        self.port = self._listen(server, self._settings.port, "MODEL_EXPRESS_SERVER_PORT", self._tls, self._auth)
        await server.start()
        opened.push_async_callback(server.stop, self._settings.drain_seconds)

    async def _serve_health(self, opened: contextlib.AsyncExitStack) -> None:
        """For probes that speak no TLS, and have no certificate to show."""
        if self._settings.health_port is None:
            return
        services = {HEALTH: self._services[HEALTH], STANDARD_HEALTH: self._health}
        server = new_server(services, auth=AuthSettings())
        port = self._settings.health_port
        self.health_port = self._listen(server, port, "MODEL_EXPRESS_HEALTH_PORT", TlsSettings(), AuthSettings())
        await server.start()
        opened.push_async_callback(server.stop, 0)

    def _listen(self, server: grpc.aio.Server, port: int, variable: str, tls: TlsSettings, auth: AuthSettings) -> int:
        address = host_and_port(self._settings.host, port)
        try:
            return listen(server, address, tls=tls, auth=auth)
        except RuntimeError as exc:
            raise _taken(address, variable, exc) from exc

    async def _serve_metrics(self, opened: contextlib.AsyncExitStack) -> None:
        host, port = self._settings.host.strip("[]"), self._settings.metrics_port
        try:
            server, thread = start_http_server(port, host, self._metrics.registry)
        except OSError as exc:
            raise _taken(host_and_port(host, port), "MODEL_EXPRESS_SERVER_METRICS_PORT", exc) from exc
        self.metrics_port = int(server.server_address[1])

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        opened.callback(close)

    def _reaper(self) -> Reaper:
        settings = self._settings
        return Reaper(
            self._store,
            self._metrics,
            stale_after_seconds=settings.heartbeat_timeout_seconds,
            removed_after_seconds=settings.removal_seconds,
            interval_seconds=settings.reaper_interval_seconds,
        )

    async def _count(self) -> None:
        """Keep the number of sources that the metrics show; say when the store goes away, and when it is back."""
        away = False
        while True:
            try:
                self._metrics.counted(await self._store.counts())
            except StoreUnavailableError as exc:
                if not away:
                    _log.error("the metadata store cannot be asked, so calls are answered with UNAVAILABLE: %s", exc)
                away = True
            except Exception:  # noqa: BLE001 - of a plugin's store, say
                _log.exception("counting sources failed")
            else:
                if away:
                    _log.info("the metadata store can be asked again")
                away = False
            await asyncio.sleep(_COUNT_SECONDS)


_COUNT_SECONDS = 5.0


def _taken(address: str, variable: str, exc: Exception) -> ModelExpressError:
    return ModelExpressError(
        f"the server cannot listen on {address}: {exc}",
        cause="another program has the port, or the address is none of this machine",
        hint=f"end the other, or set {variable}",
    )
