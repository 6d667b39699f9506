"""Which records of workers a reader believes.

A record is a claim of its publisher. Where the server authenticates callers, a reader believes those that carry its own
name, or one that the user trusts, and connects only to the address that the publisher published from, or to a host that
the user allowed. Whether callers are authenticated or not, no record leads to a link-local address, where clouds answer
with credentials, or to an address that is no host.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from attrs import frozen

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.sources.settings import TrustSettings

__all__ = ["Claim", "is_no_host", "reason_to_distrust", "reason_to_distrust_publisher"]

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


@frozen
class Claim:
    """What a record claims, and what the server knows of its publisher.

    Attributes:
        endpoint: Where the worker is said to be.
        publisher: Authenticated name of the publisher; empty if unknown.
        publisher_address: IP address from which it published; empty if unknown.
    """

    endpoint: Endpoint
    publisher: str = ""
    publisher_address: str = ""


def reason_to_distrust(claim: Claim, caller: str, settings: TrustSettings) -> str:
    """Return why a reader should not connect to the worker; empty if it may.

    Args:
        claim: The record.
        caller: The reader's own name, as the server authenticated it; empty if the server authenticates no callers.
        settings: What the user trusts.
    """
    host = claim.endpoint.host
    address = _address(host)
    if is_no_host(host):
        return f"{host} is an address where no worker can be"
    if not caller:
        return ""
    if reason := reason_to_distrust_publisher(claim.publisher, caller, settings):
        return reason
    if address is not None and str(address) == claim.publisher_address:
        return ""
    if not _is_allowed(host.lower(), address, settings.hosts):
        return f"{host} is neither the address that it was published from nor in MX_PEER_HOSTS"
    return ""


def reason_to_distrust_publisher(publisher: str, caller: str, settings: TrustSettings) -> str:
    """Return why a reader should not believe what ``publisher`` published; empty if it may. See above."""
    if not caller or publisher == caller or _matches(publisher, settings.publishers):
        return ""
    return f"it was published by {publisher!r}, which MX_TRUSTED_PUBLISHERS does not list"


def is_no_host(host: str) -> bool:
    """Return whether ``host`` is an address where no program of ours can be, such as a cloud's metadata server."""
    address = _address(host)
    return address is not None and (address.is_link_local or address.is_unspecified or address.is_multicast)


def _address(host: str) -> _Address | None:
    """The address that ``host`` is, however it is spelled; None for a name."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:  # resolvers take 0xa9fea9fe and 169.16689662, too
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return bool(name) and any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_allowed(host: str, address: _Address | None, allowed: Sequence[str]) -> bool:
    """Whether ``allowed`` has the host, or a network that the address is in.

    A pattern is for names alone: the owner of a domain decides which names are in it, and not which addresses are.
    """
    if address is None:
        return _matches(host.rstrip("."), [pattern.lower() for pattern in allowed])
    networks = [ipaddress.ip_network(text, strict=False) for text in allowed if _is_network(text)]
    return any(address in network for network in networks if network.version == address.version)


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True
