"""The server: its services, its store, its reaper, from the first port to the last call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc.aio

from modelexpress_core.contracts.authenticator import Authenticator
from modelexpress_core.contracts.metadata_store import MetadataStore, StoreUnavailableError
from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.contracts.storage import Storage
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.plugins import SERVER_SERVICE, STORAGE, PluginManager
from modelexpress_core.server.calls import LoggingInterceptor
from modelexpress_core.server.environment import with_settings
from modelexpress_core.server.files import OpenFiles
from modelexpress_core.server.interceptors import MetricsInterceptor
from modelexpress_core.server.metrics import CacheMetrics, ServerMetrics
from modelexpress_core.server.metrics_port import MetricsPort, read_token
from modelexpress_core.server.reaper import Reaper
from modelexpress_core.server.replicas import Replicas
from modelexpress_core.server.services.health import StandardHealth
from modelexpress_core.server.services.offered import OfferedServices
from modelexpress_core.server.settings import CacheSettings, LimitSettings, ServerSettings
from modelexpress_core.server.stores.measured import MeasuredStore
from modelexpress_core.server.tracing import span_interceptors
from modelexpress_core.uri import ModelURI, host_and_port
from modelexpress_core.wire.admission import MessageLimits
from modelexpress_core.wire.authentication import open_authenticator
from modelexpress_core.wire.rpc import HEALTH, STANDARD_HEALTH, handler
from modelexpress_core.wire.serving import listen, new_server
from modelexpress_core.wire.settings import AuthSettings, TlsSettings

if TYPE_CHECKING:
    from modelexpress_core.server.services.cached import CacheServing

__all__ = ["Server"]

_log = logging.getLogger(__name__)


class Server:
    """Serves within its ``async with`` block; at its end, calls in flight may end first.

    Args:
        settings: How to run.
        store: The store of the metadata; closed at the end.
        plugins: Plugins, which offer the services (the server's own are core's) and the authenticator.
        tls: Files of TLS; the server speaks it if a certificate is among them.
        auth: How callers are authenticated.
        limits: How much callers may make the server hold.
        cache: Where it keeps models; without a directory it keeps none.
        environ: Variables, for the factories of plugins.

    Attributes:
        port: Port of the gRPC services.
        health_port: Port of the services of health alone, without TLS; 0 if none was asked for.
        metrics_port: Port of the metrics.
        bulk_port: Port on which models are sent as raw bytes; 0 if there is none.
    """

    def __init__(
        self,
        settings: ServerSettings,
        store: MetadataStore,
        plugins: PluginManager,
        *,
        tls: TlsSettings | None = None,
        auth: AuthSettings | None = None,
        limits: LimitSettings | None = None,
        cache: CacheSettings | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = settings
        self._plugins = plugins
        self._tls = tls or TlsSettings()
        self._auth = auth or AuthSettings()
        self._limits = limits or LimitSettings()
        self._cache = cache or CacheSettings()
        self._environ = with_settings(environ or {}, settings, self._tls, self._auth, self._limits, self._cache)
        self._metrics = ServerMetrics()
        self._store = MeasuredStore(store, self._metrics)
        self._services = OfferedServices(plugins.records(SERVER_SERVICE))
        self._health = StandardHealth(self._services.names)
        self._closing = contextlib.AsyncExitStack()
        self._replicas: Replicas | None = None
        self.port = 0
        self.health_port = 0
        self.metrics_port = 0
        self.bulk_port = 0

    async def __aenter__(self) -> Server:
        async with contextlib.AsyncExitStack() as opened:
            opened.push_async_callback(self._store.close)
            await self._serve_metrics(opened)
            if self._cache.endpoint is not None:
                address = f"{'mxs' if self._tls.certificate else 'mx'}://{self._cache.endpoint}"
                self._replicas = Replicas(self._store, address, asyncio.get_running_loop())
            cache = self._open_cache()
            if cache is not None:
                opened.push_async_callback(asyncio.to_thread, cache.close)
            handlers = await self._serve(opened, cache)
            await self._serve_health(opened, handlers)
            tasks = [self._reaper().run(), self._count_sources(), OpenFiles().watch()]
            for task in (*tasks, self._keep_limits(cache), self._keep_claims(cache)):
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

    def _open_cache(self) -> CacheServing | None:
        """The cache, and its bulk channel.

        Raises:
            ModelExpressError: The directory cannot be used.
        """
        if self._cache.directory is None:
            return None
        # Only a server with a cache needs what it is made of.
        from modelexpress_core.server.cache import ModelCache
        from modelexpress_core.server.services.cache_bulk import open_bulk
        from modelexpress_core.server.services.cached import CacheServing

        cache = ModelCache(
            self._cache.directory,
            settings=self._cache,
            environ=self._environ,
            plugins=self._plugins,
            lease=self._replicas,
        )
        try:
            metrics = CacheMetrics(self._metrics.registry, cache.stats)
            serving = CacheServing(cache, rights=self._auth.rights, metrics=metrics, may_delete=self._cache.may_delete)
            if self._cache.bulk_port:
                serving.bulk = open_bulk(
                    cache,
                    metrics,
                    host=self._settings.host,
                    port=self._cache.bulk_port,
                    replica_host=Endpoint.parse(self._cache.endpoint).host if self._cache.endpoint else "",
                    plaintext=self._cache.bulk_plaintext,
                    tls=self._tls,
                    auth=self._auth,
                )
        except BaseException:
            cache.close()
            raise
        self.bulk_port = serving.bulk.port if serving.bulk is not None else 0
        return serving

    async def _keep_claims(self, cache: CacheServing | None) -> None:
        """Tell the other replicas what this one has, as long as it runs."""
        if cache is not None and self._replicas is not None:
            await asyncio.to_thread(cache.cache.claim_complete)
            await self._replicas.run()

    async def _keep_limits(self, cache: CacheServing | None) -> None:
        """Remove models that nobody reads any more, where limits say so."""
        while cache is not None:
            await asyncio.sleep(_EVICT_SECONDS)
            try:
                await asyncio.to_thread(cache.cache.evict)
            except Exception:  # noqa: BLE001 - the disk may fail, and the server goes on
                _log.exception("removing models from the cache failed")

    async def _serve(
        self, opened: contextlib.AsyncExitStack, cache: CacheServing | None
    ) -> Mapping[str, grpc.GenericRpcHandler[Any, Any]]:
        """Begin to serve all services; returns the handler of each."""
        # From the outermost to the innermost: what happens in a call is within its span, and before its log line.
        interceptors = [*span_interceptors(), LoggingInterceptor(), MetricsInterceptor(self._metrics)]
        authenticator = open_authenticator(self._auth, self._plugins, self._environ)
        closing = await opened.enter_async_context(contextlib.AsyncExitStack())
        handlers = {
            **self._services.make(self._context(closing, cache)),
            STANDARD_HEALTH.name: handler(STANDARD_HEALTH, self._health),
        }
        limits = MessageLimits(
            message_bytes=self._limits.message_bytes,
            receiving_bytes=self._limits.receiving_bytes,
            answer_bytes=self._limits.answer_bytes,
        )
        server = new_server(handlers, authenticator=authenticator, interceptors=interceptors, limits=limits)
        port = self._settings.port
        self.port = self._listen(server, port, "MODEL_EXPRESS_SERVER_PORT", self._tls, authenticator)
        await server.start()
        opened.push_async_callback(server.stop, self._settings.drain_seconds)
        return handlers

    def _context(self, closing: contextlib.AsyncExitStack, cache: CacheServing | None) -> ServiceContext:
        return ServiceContext(
            store=self._store,
            settings=self._environ,
            plugins=_ServicePlugins(self._plugins, self._environ),
            metrics=self._metrics.registry,
            closing=closing,
            cache=cache,
        )

    async def check(self) -> None:
        """Do what precedes serving: open the cache, make the services, read the metrics' token, and ask the store.

        It serves nothing.

        Call it once, and on a server that is not entered.

        Raises:
            PluginLoadError: A service cannot be made.
            SettingsError: The file with the token of the metrics cannot be used.
            StoreUnavailableError: The store does not answer. A server would start, and answer UNAVAILABLE.
        """
        async with contextlib.AsyncExitStack() as opened:
            opened.push_async_callback(self._store.close)
            closing = await opened.enter_async_context(contextlib.AsyncExitStack())
            cache = self._open_cache()
            if cache is not None:
                closing.callback(cache.close)
            self._services.make(self._context(closing, cache))
            if self._settings.metrics_token is not None:
                read_token(self._settings.metrics_token)
            await self._store.counts()

    async def _serve_health(
        self, opened: contextlib.AsyncExitStack, handlers: Mapping[str, grpc.GenericRpcHandler[Any, Any]]
    ) -> None:
        """Begin to serve health alone, for probes without TLS and certificate."""
        if self._settings.health_port is None:
            return
        of_health = {name: handlers[name] for name in (HEALTH.name, STANDARD_HEALTH.name) if name in handlers}
        server = new_server(of_health, limits=MessageLimits(_MAX_PROBE_BYTES, 64 * _MAX_PROBE_BYTES))
        port = self._settings.health_port
        self.health_port = self._listen(server, port, "MODEL_EXPRESS_HEALTH_PORT", TlsSettings(), None)
        await server.start()
        opened.push_async_callback(server.stop, 0)

    def _listen(
        self, server: grpc.aio.Server, port: int, variable: str, tls: TlsSettings, authenticator: Authenticator | None
    ) -> int:
        address = host_and_port(self._settings.host, port)
        try:
            return listen(server, address, tls=tls, authenticator=authenticator)
        except RuntimeError as exc:
            raise _address_in_use(address, variable, exc) from exc

    async def _serve_metrics(self, opened: contextlib.AsyncExitStack) -> None:
        host, port = self._settings.host.strip("[]"), self._settings.metrics_port
        try:
            metrics = MetricsPort(host, port, self._metrics.registry, self._settings.metrics_token)
        except OSError as exc:
            raise _address_in_use(host_and_port(host, port), "MODEL_EXPRESS_SERVER_METRICS_PORT", exc) from exc
        self.metrics_port = metrics.port
        opened.callback(metrics.close)

    def _reaper(self) -> Reaper:
        settings = self._settings
        return Reaper(
            self._store,
            self._metrics,
            stale_after_seconds=settings.heartbeat_timeout_seconds,
            removed_after_seconds=settings.removal_seconds,
            interval_seconds=settings.reaper_interval_seconds,
        )

    async def _count_sources(self) -> None:
        """Update the metric of sources, and log when the store stops answering, and when it answers again."""
        silent = False
        while True:
            try:
                self._metrics.counted(await self._store.counts())
            except StoreUnavailableError as exc:
                if not silent:
                    _log.error("the metadata store does not answer, so calls are answered with UNAVAILABLE: %s", exc)
                silent = True
            except Exception:  # noqa: BLE001 - of a plugin's store, say
                _log.exception("counting sources failed")
            else:
                if silent:
                    _log.info("the metadata store answers again")
                silent = False
            await asyncio.sleep(_COUNT_SECONDS)


_COUNT_SECONDS = 5.0

#: How often the limits of the cache are looked at besides before each download.
_EVICT_SECONDS = 60.0

#: A probe has the name of a service and no more.
_MAX_PROBE_BYTES = 64 << 10


def _address_in_use(address: str, variable: str, exc: Exception) -> ModelExpressError:
    return ModelExpressError(
        f"the server cannot listen on {address}: {exc}",
        cause="another program uses the port, or this machine does not have the address",
        hint=f"end the other program, or set {variable}",
    )


class _ServicePlugins:
    """The plugins, as services see them."""

    def __init__(self, plugins: PluginManager, environ: Mapping[str, str]) -> None:
        self._plugins = plugins
        self._environ = environ

    def rewrite_uri(self, uri: ModelURI) -> ModelURI:
        """The URI to use in place of ``uri``."""
        return self._plugins.rewrite_uri(uri, self._environ)

    def storage(self, uri: ModelURI, environ: Mapping[str, str]) -> Storage:
        """The storage for ``uri``."""
        _, storage = self._plugins.open(STORAGE, uri, environ)
        return storage
