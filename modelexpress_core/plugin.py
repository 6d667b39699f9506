"""Core's own plugins, registered with the hooks that all plugins use."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import (
    AuthenticatorProvider,
    CommandProvider,
    DiscoveryProvider,
    MetadataStoreProvider,
    ServerServiceProvider,
    StorageCapabilities,
    StorageProvider,
    TransportProvider,
)
from modelexpress_core.server.settings import (
    CacheSettings,
    ConfigPath,
    LimitSettings,
    LogSettings,
    SecurityVariables,
    ServerSettings,
    SpanSettings,
    StoreVariables,
)
from modelexpress_core.settings import from_env
from modelexpress_core.sources.ranking import rank
from modelexpress_core.sources.settings import (
    DiscoverySettings,
    FollowSettings,
    PodSettings,
    PublishingSettings,
    ServerAddress,
    ServiceSettings,
    SharedCacheSettings,
    StaticSources,
    TrustSettings,
    WorkerSettings,
)
from modelexpress_core.wire.settings import AuthSettings, TlsSettings, TokenSettings

if TYPE_CHECKING:
    import typer

    from modelexpress_core.contracts.authenticator import Authenticator
    from modelexpress_core.contracts.discovery import Discovery
    from modelexpress_core.contracts.metadata_store import MetadataStore
    from modelexpress_core.contracts.service import ServiceContext
    from modelexpress_core.contracts.storage import Storage
    from modelexpress_core.contracts.transport import Transport
    from modelexpress_core.uri import ModelURI


_CLIENT_SETTINGS = (ServerAddress, TlsSettings, TokenSettings)


def _open_file(uri: ModelURI, settings: Mapping[str, str]) -> Storage:
    from modelexpress_core.storage.file import open_file

    return open_file(uri, settings)


def _open_memory(uri: ModelURI, settings: Mapping[str, str]) -> Storage:
    from modelexpress_core.storage.memory import open_memory

    return open_memory(uri, settings)


def _open_memory_store(uri: ModelURI, settings: Mapping[str, str]) -> MetadataStore:  # noqa: ARG001 - a factory's signature
    from modelexpress_core.server.stores.memory import MemoryStore

    return MemoryStore()


def _serve() -> Callable[..., None]:
    from modelexpress_core.cli.serve import serve

    return serve


def _health() -> Callable[..., None]:
    from modelexpress_core.cli.sources import health

    return health


def _models() -> typer.Typer:
    from modelexpress_core.cli.models import models

    return models()


def _sources() -> Callable[..., None]:
    from modelexpress_core.cli.sources import sources

    return sources


@hookimpl
def mx_register_commands() -> list[CommandProvider]:
    """``mx serve``, ``mx health``, ``mx sources`` and ``mx models``."""
    return [
        CommandProvider(
            "serve",
            _serve,
            help="Run a server, which lists the workers that hold models.",
            settings=(
                ConfigPath,
                ServerSettings,
                CacheSettings,
                LimitSettings,
                TlsSettings,
                AuthSettings,
                SecurityVariables,
                StoreVariables,
                LogSettings,
                SpanSettings,
            ),
        ),
        CommandProvider(
            "health", _health, help="Show the status, version and uptime of a server.", settings=_CLIENT_SETTINGS
        ),
        CommandProvider(
            "sources",
            _sources,
            help="List the workers that hold models.",
            settings=_CLIENT_SETTINGS,
        ),
        CommandProvider(
            "models",
            _models,
            help="Show and manage the models in a cache.",
            settings=(*_CLIENT_SETTINGS, CacheSettings),
        ),
    ]


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    """``file`` and ``memory``."""
    return [
        # Short gaps are skipped, too: bytes are the main cost on a network file system, and rows of a matrix that is
        # split among ranks have gaps. More threads than processors do not speed up the page cache. The number of reads
        # grows on a disk or a network file system.
        StorageProvider(
            "file",
            ("file",),
            _open_file,
            capabilities=StorageCapabilities(
                read_runs=True,
                recheck=True,
                concurrency=min(8, len(os.sched_getaffinity(0))),
                most_concurrency=32,
                request_cost_bytes=128,
            ),
        ),
        StorageProvider(
            "memory",
            ("memory",),
            _open_memory,
            capabilities=StorageCapabilities(concurrency=4, most_concurrency=8, request_cost_bytes=128),
        ),
    ]


def _open_inproc(uri: ModelURI, settings: Mapping[str, str]) -> Transport:
    from modelexpress_core.transport.inproc import open_inproc

    return open_inproc(uri, settings)


@hookimpl
def mx_register_transports() -> list[TransportProvider]:
    """``inproc``."""
    return [TransportProvider("inproc", ("inproc",), _open_inproc, offered=False)]


def _open_redis_store(uri: ModelURI, settings: Mapping[str, str]) -> MetadataStore:
    from modelexpress_core.server.stores.redis import open_redis

    return open_redis(uri, settings)


@hookimpl
def mx_register_metadata_stores() -> list[MetadataStoreProvider]:
    """``memory``, ``redis`` and ``rediss``."""
    return [
        MetadataStoreProvider("memory", ("memory",), _open_memory_store),
        MetadataStoreProvider(
            "redis", ("redis", "rediss"), _open_redis_store, install_hint="modelexpress-core[server]"
        ),
    ]


def _open_server_discovery(uri: ModelURI, settings: Mapping[str, str]) -> Discovery:
    from modelexpress_core.sources.discovery.server import open_server

    return open_server(uri, settings)


def _open_static_discovery(uri: ModelURI, settings: Mapping[str, str]) -> Discovery:
    from modelexpress_core.sources.discovery.static import open_static

    return open_static(uri, settings)


def _open_service_discovery(uri: ModelURI, settings: Mapping[str, str]) -> Discovery:
    from modelexpress_core.sources.discovery.kubernetes_service import open_service

    return open_service(uri, settings)


@hookimpl
def mx_register_discoveries() -> list[DiscoveryProvider]:
    """``server``, ``static`` and ``k8s-service``."""
    return [
        DiscoveryProvider(
            "k8s-service",
            ("k8s-service",),
            _open_service_discovery,
            install_hint="modelexpress-core[server]",
            settings=(ServiceSettings, WorkerSettings),
        ),
        DiscoveryProvider(
            "server",
            ("server",),
            _open_server_discovery,
            install_hint="modelexpress-core[server]",
            settings=(
                DiscoverySettings,
                FollowSettings,
                SharedCacheSettings,
                TrustSettings,
                PublishingSettings,
                PodSettings,
                WorkerSettings,
            ),
        ),
        DiscoveryProvider("static", ("static",), _open_static_discovery, settings=StaticSources),
    ]


def _open_tokens(settings: Mapping[str, str]) -> Authenticator:
    from modelexpress_core.wire.authentication import TokenAuthenticator

    return TokenAuthenticator(from_env(AuthSettings, settings).tokens_path())


def _open_certificates(settings: Mapping[str, str]) -> Authenticator:  # noqa: ARG001 - a factory's signature
    from modelexpress_core.wire.authentication import CertificateAuthenticator

    return CertificateAuthenticator()


@hookimpl
def mx_register_authenticators() -> list[AuthenticatorProvider]:
    """``token`` and ``mtls``."""
    hint = "modelexpress-core[server]"
    return [
        AuthenticatorProvider("token", _open_tokens, install_hint=hint, settings=AuthSettings),
        AuthenticatorProvider("mtls", _open_certificates, install_hint=hint, settings=TlsSettings),
    ]


def _make_health(context: ServiceContext) -> Any:  # noqa: ANN401 - of gRPC, which is imported within
    from modelexpress_core.server.services.basic import make_health

    return make_health(context)


def _make_api(context: ServiceContext) -> Any:  # noqa: ANN401 - likewise
    from modelexpress_core.server.services.basic import make_api

    return make_api(context)


def _make_p2p(context: ServiceContext) -> Any:  # noqa: ANN401 - likewise
    from modelexpress_core.server.services.p2p import make_p2p

    return make_p2p(context)


def _make_access(context: ServiceContext) -> Any:  # noqa: ANN401 - likewise
    from modelexpress_core.server.services.access import make_access

    return make_access(context)


def _make_models(context: ServiceContext) -> Any:  # noqa: ANN401 - likewise
    from modelexpress_core.server.services import no_cache

    if context.cache is None:
        return no_cache.make_models()
    from modelexpress_core.server.services.models import make_models

    return make_models(context)


def _make_cache(context: ServiceContext) -> Any:  # noqa: ANN401 - likewise
    from modelexpress_core.server.services import no_cache

    if context.cache is None:
        return no_cache.make_cache()
    from modelexpress_core.server.services.cache import make_cache

    return make_cache(context)


@hookimpl
def mx_register_server_services() -> list[ServerServiceProvider]:
    """Health, pings, the metadata of sources, read grants, and the model cache."""
    return [
        ServerServiceProvider("model_express.health.HealthService", _make_health),
        ServerServiceProvider("model_express.api.ApiService", _make_api),
        ServerServiceProvider("model_express.p2p.P2pService", _make_p2p, settings=ServerSettings),
        ServerServiceProvider("modelexpress.access.AccessService", _make_access),
        ServerServiceProvider("model_express.model.ModelService", _make_models, settings=CacheSettings),
        ServerServiceProvider("modelexpress.cache.CacheService", _make_cache, settings=CacheSettings),
    ]


@hookimpl(trylast=True)
def mx_rank_candidates(request: LoadRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """By tier; the peers of a tier are spread over their readers, other places keep their order."""
    return rank(request, candidates)
