"""What the plugin offers; imports no NIXL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import TransportProvider
from mx_nixl.settings import NixlSettings

if TYPE_CHECKING:
    from modelexpress_core.contracts.candidates import Peer, Tier
    from modelexpress_core.contracts.transport import Transport
    from modelexpress_core.uri import ModelURI


def _open_nixl(uri: ModelURI, settings: Mapping[str, str]) -> Transport:
    from mx_nixl._transport import open_nixl

    return open_nixl(uri, settings)


def _is_offered(settings: Mapping[str, str]) -> bool:
    from mx_nixl._lanes import is_offered

    return is_offered(settings)


def _tier_of(peer: Peer, settings: Mapping[str, str]) -> Tier:
    from mx_nixl._lanes import tier_of

    return tier_of(peer, settings)


@hookimpl
def mx_register_transports() -> list[TransportProvider]:
    """``nixl``."""
    return [
        TransportProvider(
            "mx-nixl",
            ("nixl",),
            _open_nixl,
            tier=_tier_of,
            offered=_is_offered,
            install_hint="mx-nixl[cu12]",
            settings=NixlSettings,
        )
    ]
