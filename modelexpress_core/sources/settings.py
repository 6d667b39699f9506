"""Which server workers and commands ask, how workers tell it what they hold, and how they find others."""

from __future__ import annotations

import ipaddress
import re

from attrs import frozen

from modelexpress_core.settings import env, names, seconds, tcp_port
from modelexpress_core.uri import redacted

__all__ = ["SELECTORS", "DiscoverySettings", "PublishingSettings", "ServerAddress", "StaticSources", "WorkerSettings"]

#: How one of several peers may be chosen; see ``modelexpress_core.sources.ranking``.
SELECTORS = ("load_aware", "random", "rendezvous_hash")

#: What existing deployments call the server's stores, and what is asked then: the server is, whatever store it has.
_BACKENDS = {
    "server": "server://",
    "redis": "server://",
    "kubernetes": "server://",
    "k8s": "server://",
    "crd": "server://",
    "memory": "server://",
    "k8s-service": "k8s-service://",
    "service": "k8s-service://",
}


def _backend(text: str) -> str:
    """The discovery that a value of ``MX_METADATA_BACKEND`` stands for."""
    try:
        return _BACKENDS[text.strip().lower()]
    except KeyError:
        reason = f"expected one of {', '.join(_BACKENDS)}"
        raise ValueError(reason) from None


def _selector(text: str) -> str:
    if text.strip() in SELECTORS:
        return text.strip()
    reason = f"expected one of {', '.join(SELECTORS)}"
    raise ValueError(reason)


def _shown(uris: tuple[str, ...]) -> str:
    return ",".join(map(redacted, uris))


def _host(text: str) -> str:
    """A name or an address, IPv6 with brackets, as it stands before a port."""
    host = text.strip()
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if ":" in bare:
        try:
            return f"[{ipaddress.IPv6Address(bare)}]"
        except ValueError:
            bare = ""
    if not re.fullmatch(r"[^\s/:@\[\]]+", bare):
        reason = "expected a host name or an address, without scheme and port"
        raise ValueError(reason)
    return bare


@frozen
class ServerAddress:
    """The server that knows who holds what."""

    url: str = env(
        "MODEL_EXPRESS_URL",
        "MX_SERVER_ADDRESS",
        default="localhost:8001",
        help="The server: host:port, http://host:port, or https://host:port for TLS.",
    )
    deadline_seconds: float = env(
        "MX_SERVER_DEADLINE_SECONDS", default=10.0, converter=seconds, help="How long one call to the server may take."
    )


@frozen
class PublishingSettings:
    """How workers say that they are alive."""

    interval_seconds: float = env(
        "MX_HEARTBEAT_INTERVAL_SECS",
        default=30.0,
        converter=seconds,
        help="How often a worker says that it is alive; well below MX_HEARTBEAT_TIMEOUT_SECS of the server.",
    )


@frozen
class WorkerSettings:
    """Where a worker offers what it holds."""

    host: str | None = env(
        "MX_WORKER_HOST",
        default=None,
        converter=_host,
        help="Name or address by which other workers reach this one; unset: the address of the way to the server.",
    )
    port: int = env(
        "MX_WORKER_GRPC_PORT",
        default=6555,
        converter=tcp_port,
        help="Port of the first device's WorkerService; the others follow it. 0: any free one.",
    )
    lease_seconds: float = env(
        "MX_WORKER_LEASE_SECONDS",
        default=600.0,
        converter=seconds,
        help="How long a reader may take; what it read after that is not trusted.",
    )
    drain_seconds: float = env(
        "MX_WORKER_DRAIN_SECONDS",
        default=30.0,
        converter=seconds,
        help="How long a worker that ends, or changes its weights, waits for readers.",
    )


@frozen
class DiscoverySettings:
    """Where peers are looked for, and which of them is chosen."""

    uris: tuple[str, ...] = env(
        "MX_DISCOVERY",
        default=(),
        converter=names,
        shown=_shown,
        help="Who is asked (URIs, comma-separated): server://, server://host:port, static://, or a plugin's.",
    )
    backend: str | None = env(
        "MX_METADATA_BACKEND",
        default=None,
        converter=_backend,
        help="The same in the words of existing deployments: server, redis and kubernetes mean server://. If neither "
        "is set, server:// is asked if MODEL_EXPRESS_URL is set, and nobody otherwise.",
    )
    selector: str = env(
        "MX_P2P_SOURCE_SELECTOR",
        default="load_aware",
        converter=_selector,
        help="How one of several peers is chosen: load_aware, rendezvous_hash or random.",
    )


@frozen
class StaticSources:
    """Places that are known beforehand."""

    uris: tuple[str, ...] = env(
        "MX_STATIC_SOURCES",
        default=(),
        converter=names,
        shown=_shown,
        help="Peers and checkpoints that static:// names: grpc://10.0.0.5:6555,s3://bucket/model.",
    )
