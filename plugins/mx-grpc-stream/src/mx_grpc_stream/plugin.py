"""What the plugin offers; imports no gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelexpress_core.contracts.candidates import Tier
from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import TransportProvider
from mx_grpc_stream.settings import GrpcStreamSettings

if TYPE_CHECKING:
    from modelexpress_core.contracts.transport import Transport
    from modelexpress_core.uri import ModelURI


def _open_grpc(uri: ModelURI, settings: Mapping[str, str]) -> Transport:
    from mx_grpc_stream._transport import open_grpc

    return open_grpc(uri, settings)


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
