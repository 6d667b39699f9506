"""Settings of clients and workers: the server, publishing, serving, and the search for peers."""

from __future__ import annotations

import ipaddress
import re

from attrs import frozen

from modelexpress_core.settings import env, names, seconds, tcp_port
from modelexpress_core.uri import redacted

__all__ = ["SELECTORS", "DiscoverySettings", "PublishingSettings", "ServerAddress", "StaticSources", "WorkerSettings"]

#: Ways to choose one of several peers; see ``modelexpress_core.sources.ranking``.
SELECTORS = ("load_aware", "random", "rendezvous_hash")

#: Values of existing deployments, which name the server's store: the server is queried, independent of its store.
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
    """The discovery for a value of ``MX_METADATA_BACKEND``."""
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
    """A name or an address, IPv6 with brackets, as written before a port."""
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
    """The server that lists which worker holds which model."""

    url: str = env(
        "MODEL_EXPRESS_URL",
        "MX_SERVER_ADDRESS",
        default="localhost:8001",
        help="The server: host:port, http://host:port, or https://host:port for TLS.",
    )
    deadline_seconds: float = env(
        "MX_SERVER_DEADLINE_SECONDS", default=10.0, converter=seconds, help="Time limit of one call to the server."
    )


@frozen
class PublishingSettings:
    """Heartbeats of workers."""

    interval_seconds: float = env(
        "MX_HEARTBEAT_INTERVAL_SECS",
        default=30.0,
        converter=seconds,
        help="Time between heartbeats of a worker; well below MX_HEARTBEAT_TIMEOUT_SECS of the server.",
    )


@frozen
class WorkerSettings:
    """How a worker serves its tensors."""

    host: str | None = env(
        "MX_WORKER_HOST",
        default=None,
        converter=_host,
        help="Name or address by which other workers reach this one; unset: the local address towards the server.",
    )
    port: int = env(
        "MX_WORKER_GRPC_PORT",
        default=6555,
        converter=tcp_port,
        help="Port of the first device's WorkerService; other devices use the next ones. 0: any free port.",
    )
    lease_seconds: float = env(
        "MX_WORKER_LEASE_SECONDS",
        default=600.0,
        converter=seconds,
        help="Time limit of a reader; bytes that it read later are not trusted.",
    )
    drain_seconds: float = env(
        "MX_WORKER_DRAIN_SECONDS",
        default=30.0,
        converter=seconds,
        help="How long a worker waits for readers before it ends or changes its weights.",
    )


@frozen
class DiscoverySettings:
    """The search for peers, and the choice among them."""

    uris: tuple[str, ...] = env(
        "MX_DISCOVERY",
        default=(),
        converter=names,
        shown=_shown,
        help="Discoveries (URIs, comma-separated): server://, server://host:port, static://, or a plugin's.",
    )
    backend: str | None = env(
        "MX_METADATA_BACKEND",
        default=None,
        converter=_backend,
        help="The discovery in the terms of existing deployments: server, redis and kubernetes mean server://. If "
        "neither is set, server:// is used if MODEL_EXPRESS_URL is set, else none.",
    )
    selector: str = env(
        "MX_P2P_SOURCE_SELECTOR",
        default="load_aware",
        converter=_selector,
        help="How one of several peers is chosen: load_aware, rendezvous_hash or random.",
    )


@frozen
class StaticSources:
    """Places that are listed in a variable."""

    uris: tuple[str, ...] = env(
        "MX_STATIC_SOURCES",
        default=(),
        converter=names,
        shown=_shown,
        help="Peers and checkpoints that static:// lists: grpc://10.0.0.5:6555,s3://bucket/model.",
    )
