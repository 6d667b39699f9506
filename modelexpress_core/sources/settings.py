"""The settings of workers and commands for the server, publishing and discovery."""

from __future__ import annotations

import ipaddress
import re

import attrs
from attrs import frozen

from modelexpress_core.contracts.metadata_store import PodReference
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import InvalidURIError
from modelexpress_core.settings import boolean, env, names, positive_integer, seconds, tcp_port
from modelexpress_core.uri import redacted

__all__ = [
    "SELECTORS",
    "DiscoverySettings",
    "FollowSettings",
    "PodSettings",
    "PublishingSettings",
    "ServerAddress",
    "ServiceSettings",
    "SharedCacheSettings",
    "StaticSources",
    "TrustSettings",
    "WorkerSettings",
]

#: Ways to choose one of several peers; see ``modelexpress_core.sources.ranking``.
SELECTORS = ("load_aware", "random", "rendezvous_hash")

#: Values of ``MX_METADATA_BACKEND`` in existing deployments -> the discovery. A store of the server means the server.
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
    """Return the discovery for a value of ``MX_METADATA_BACKEND``."""
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
    """Parse a host name or an address; an IPv6 address is returned with brackets, ready for ``:port``."""
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
    """The server that keeps the records of workers."""

    url: str = env(
        "MODEL_EXPRESS_URL",
        "MX_SERVER_ADDRESS",
        default="localhost:8001",
        help="Address of the server: host:port, http://host:port, or https://host:port for TLS.",
    )
    deadline_seconds: float = env(
        "MX_SERVER_DEADLINE_SECONDS", default=10.0, converter=seconds, help="How long one call to the server may take."
    )


@frozen
class SharedCacheSettings:
    """Whether loads use the cache of the server that MODEL_EXPRESS_URL names, and how."""

    no_shared_storage: bool = env(
        "MODEL_EXPRESS_NO_SHARED_STORAGE",
        default=False,
        converter=boolean,
        help="Stream models from the cache of the server that MODEL_EXPRESS_URL names, rather than from their source.",
    )
    directory: str | None = env(
        "MODEL_EXPRESS_CACHE_DIRECTORY",
        default=None,
        help="The server's directory of models, where this worker has it too, at this path: the server downloads "
        "models, and the worker reads the files there.",
    )


@frozen
class PublishingSettings:
    """How often workers send heartbeats."""

    interval_seconds: float = env(
        "MX_HEARTBEAT_INTERVAL_SECS",
        default=30.0,
        converter=seconds,
        help="Time between two heartbeats of a worker; well below MX_HEARTBEAT_TIMEOUT_SECS of the server.",
    )


def _seconds_or_none(text: str) -> float | None:
    """A number of seconds; None for 0."""
    return None if re.fullmatch(r"0+(\.0*)?s?", text.strip()) else seconds(text)


@frozen
class FollowSettings:
    """Whether workers that start at the same time wait for the first of them."""

    seconds: float | None = env(
        "MX_FOLLOW",
        default=None,
        converter=_seconds_or_none,
        help="How many seconds a worker waits at most for another one that loads the same tensors from storage, to "
        "read them from that worker. Unset or 0: it does not wait.",
    )


@frozen
class PodSettings:
    """The pod of Kubernetes that a worker runs in, which the downward API can tell it."""

    name: str = env("POD_NAME", default="", help="Name of the worker's pod; a server in Kubernetes keeps it.")
    uid: str = env(
        "POD_UID",
        default="",
        help="Uid of the worker's pod: with name and namespace, Kubernetes removes the worker's record with the pod.",
    )
    namespace: str = env("POD_NAMESPACE", default="", help="Namespace of the worker's pod.")

    def reference(self) -> PodReference | None:
        """The pod; None if it is not known."""
        return PodReference(self.name, self.uid, self.namespace) if self.uid else None


@frozen
class WorkerSettings:
    """Where a worker offers its tensors, and how long it waits for readers."""

    host: str | None = env(
        "MX_WORKER_HOST",
        default=None,
        converter=_host,
        help="Host name or address at which other workers reach this one; unset: the local address on the route to "
        "the server.",
    )
    port: int = env(
        "MX_WORKER_GRPC_PORT",
        default=6555,
        converter=tcp_port,
        help="Port of WorkerService for the first device; the others use the ports after it. 0: any free port.",
    )
    lease_seconds: float = env(
        "MX_WORKER_LEASE_SECONDS",
        default=600.0,
        converter=seconds,
        help="How long a reader may take; data that it reads after that is discarded.",
    )
    drain_seconds: float = env(
        "MX_WORKER_DRAIN_SECONDS",
        default=30.0,
        converter=seconds,
        help="How long a worker waits for readers before it ends or changes its weights.",
    )


@frozen
class DiscoverySettings:
    """Which discoveries find peers, and how those to read are chosen."""

    uris: tuple[str, ...] = env(
        "MX_DISCOVERY",
        default=(),
        converter=names,
        shown=_shown,
        help="Discoveries to use (URIs, comma-separated): server://, server://host:port, k8s-service://, static://, or "
        "a plugin's.",
    )
    backend: str | None = env(
        "MX_METADATA_BACKEND",
        default=None,
        converter=_backend,
        help="The discovery by its name in existing deployments: server, redis and kubernetes mean server://, "
        "k8s-service means k8s-service://. If neither this nor MX_DISCOVERY is set, server:// is used if "
        "MODEL_EXPRESS_URL is set, otherwise none.",
    )
    selector: str = env(
        "MX_P2P_SOURCE_SELECTOR",
        default="load_aware",
        converter=_selector,
        help="How one of several peers is chosen: load_aware, rendezvous_hash or random.",
    )
    sources: int = env(
        "MX_P2P_SOURCES",
        default=4,
        converter=positive_integer,
        help="Most workers that one load reads from at the same time; 1 reads from one after the other.",
    )

    @property
    def without_server(self) -> bool:
        """Whether workers are found without a server: then none publishes itself to one."""
        uris = self.uris or ((self.backend,) if self.backend else ())
        return bool(uris) and all(uri.startswith("k8s-service:") for uri in uris)


def _service(text: str) -> str:
    """Check the pattern of a Service: it is an address once ``{rank}`` is filled in."""
    try:
        Endpoint.parse(text.strip().replace("{rank}", "0"))
    except InvalidURIError:
        reason = "expected a host name or host:port, in which {rank} may stand for the rank"
        raise ValueError(reason) from None
    return text.strip()


@frozen
class ServiceSettings:
    """Which Service of Kubernetes the workers of a model are behind, where no server lists them."""

    pattern: str = env(
        "MX_K8S_SERVICE_PATTERN",
        default="mx-sources",
        converter=_service,
        help="Address of the workers for k8s-service://: host or host:port, in which {rank} stands for the rank, with "
        "https:// for TLS. Without a port it is MX_WORKER_GRPC_PORT and the rank.",
    )

    def endpoint(self, rank: int, first_port: int) -> Endpoint:
        """The address of the workers of a rank.

        Args:
            rank: The rank.
            first_port: Port of rank 0, if the pattern has none.
        """
        text = self.pattern.replace("{rank}", str(rank))
        endpoint = Endpoint.parse(text)
        if re.search(r":\d+/?$", text):
            return endpoint
        return attrs.evolve(endpoint, port=first_port + rank)


@frozen
class TrustSettings:
    """Which workers a reader believes, where the server authenticates callers."""

    publishers: tuple[str, ...] = env(
        "MX_TRUSTED_PUBLISHERS",
        default=(),
        converter=names,
        help="Names of callers whose workers are read, comma-separated; * and ? match. Workers that were published "
        "under this process's own name always are.",
    )
    hosts: tuple[str, ...] = env(
        "MX_PEER_HOSTS",
        default=(),
        converter=names,
        help="Where workers may be besides the address that published them: host names (* matches), addresses "
        "and networks, comma-separated: *.svc.cluster.local,10.8.0.0/16.",
    )


@frozen
class StaticSources:
    """Sources that are known in advance."""

    uris: tuple[str, ...] = env(
        "MX_STATIC_SOURCES",
        default=(),
        converter=names,
        shown=_shown,
        help="Peers and checkpoints that static:// names: grpc://10.0.0.5:6555,s3://bucket/model.",
    )
