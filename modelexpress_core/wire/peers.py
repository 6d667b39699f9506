"""gRPC's names of peers, which it makes of their addresses."""

from __future__ import annotations

import ipaddress
from urllib.parse import unquote

__all__ = ["peer_address", "peer_host"]


def peer_address(peer: str) -> str:
    """The IP address in gRPC's name of a peer, in its usual form; empty if it has none, as over a Unix socket.

    It is the address of the last proxy, if there are any.

    Args:
        peer: As gRPC's contexts have it: ``"ipv4:10.0.0.1:5000"``.
    """
    kind, _, rest = unquote(peer).partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return ""
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    return str(getattr(address, "ipv4_mapped", None) or address)


def peer_host(peer: str) -> str:
    """What the connections of a peer have in common: its address, or gRPC's name where it has none."""
    return peer_address(peer) or peer
