"""What the plugin offers; imports no gRPC and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelexpress_core.contracts.candidates import Tier
from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageCapabilities, StorageProvider, TransportProvider
from mx_grpc_stream.settings import GrpcStreamSettings

if TYPE_CHECKING:
    from modelexpress_core.contracts.storage import Storage
    from modelexpress_core.contracts.transport import Transport
    from modelexpress_core.uri import ModelURI


def _open_grpc(uri: ModelURI, settings: Mapping[str, str]) -> Transport:
    from mx_grpc_stream._transport import open_grpc

    return open_grpc(uri, settings)


def _open_cache(uri: ModelURI, settings: Mapping[str, str]) -> Storage:
    from mx_grpc_stream._storage import open_cache

    return open_cache(uri, settings)


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    """``mx``, and ``mxs`` with TLS."""
    return [
        # A request costs a round trip. The server gathers runs, so that gaps between them need not travel.
        StorageProvider(
            "mx-grpc-stream",
            ("mx", "mxs"),
            _open_cache,
            capabilities=StorageCapabilities(
                read_runs=True,
                recheck=True,
                patience=True,
                compares=True,
                diagnosis=True,
                global_versions=True,
                concurrency=4,
                most_concurrency=16,
                request_cost_bytes=64 << 10,
                run_cost_bytes=128,
            ),
            tier=Tier.CACHE,
            install_hint="modelexpress-core[grpc]",
            settings=GrpcStreamSettings,
        )
    ]


@hookimpl
def mx_register_transports() -> list[TransportProvider]:
    """``grpc``."""
    return [
        TransportProvider(
            "mx-grpc-stream",
            ("grpc",),
            _open_grpc,
            tier=Tier.PEER,
            install_hint="modelexpress-core[grpc]",
            settings=GrpcStreamSettings,
        )
    ]
