"""The records that register hooks return: each describes one thing that a plugin offers, and holds its factory.

Records are frozen. Creating one does no I/O and imports no SDK; its factory does, at first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import attrs
from attrs import field, frozen

from modelexpress_core.contracts.authenticator import Authenticator
from modelexpress_core.contracts.candidates import Peer, Tier
from modelexpress_core.contracts.discovery import Discovery
from modelexpress_core.contracts.metadata_store import MetadataStore
from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.contracts.storage import Storage
from modelexpress_core.contracts.transport import Transport
from modelexpress_core.uri import SCHEME_PATTERN, ModelURI

__all__ = [
    "API_VERSION",
    "AuthenticatorProvider",
    "CommandProvider",
    "DiscoveryProvider",
    "MetadataStoreProvider",
    "PeerTier",
    "SchemeProvider",
    "ServerServiceProvider",
    "StorageCapabilities",
    "StorageProvider",
    "TransportProvider",
]

#: Version of the hook contract. It grows with each change that breaks existing plugins.
API_VERSION = 1


def _check_name(_record: object, _attribute: attrs.Attribute[str], name: object) -> None:
    if not isinstance(name, str) or not name.strip():
        message = f"a record needs a name, not {name!r}"
        raise ValueError(message)


def _scheme_tuple(schemes: object) -> tuple[str, ...]:
    if isinstance(schemes, str):
        message = f"schemes is {schemes!r}; have you forgotten the comma? Write ({schemes!r},)"
        raise TypeError(message)
    listed: tuple[str, ...] = tuple(schemes)  # type: ignore[arg-type]  # checked next
    for scheme in listed:
        if not isinstance(scheme, str) or not SCHEME_PATTERN.fullmatch(scheme):
            message = f"{scheme!r} is no URI scheme: use lower-case letters, digits, + . - and begin with a letter"
            raise ValueError(message)
    if not listed:
        message = "a record needs at least one scheme"
        raise ValueError(message)
    if len(set(listed)) < len(listed):
        message = f"a scheme is listed twice in {listed!r}"
        raise ValueError(message)
    return listed


def _check_factory(_record: object, _attribute: attrs.Attribute[Any], factory: object) -> None:
    if not callable(factory):
        message = f"factory is {factory!r}, which cannot be called; pass the function itself"
        raise TypeError(message)


def _tier_or_function(tier: Any) -> Any:  # noqa: ANN401 - a tier, its number, or a function
    return tier if callable(tier) else Tier(tier)


def _check_peer_tier(_record: object, _attribute: attrs.Attribute[Any], tier: Tier | PeerTier) -> None:
    if isinstance(tier, Tier) and tier >= Tier.CACHE:
        message = f"the tier of a transport is FABRIC_PEER, PEER or OTHER_PEER, not {tier.name}"
        raise ValueError(message)


def _check_file_tier(_record: object, _attribute: attrs.Attribute[Tier], tier: Tier) -> None:
    if tier < Tier.CACHE:
        message = f"the tier of a storage is CACHE or ORIGIN, not {tier.name}"
        raise ValueError(message)


@frozen
class StorageCapabilities:
    """The optional methods of a storage, and the cost of its reads.

    Attributes:
        read_batch: Has its own engine, which reads many ranges at once: a ``BatchStorage``. ``concurrency`` and
            ``most_concurrency`` count its batches. It declares no ``read_runs``.
        read_runs: Reads many short runs in one call: a ``RunStorage``.
        recheck: Compares the version of an object again at the end of a load: a ``RecheckingStorage``.
        patience: Gives up a read after ``patience_seconds`` without a byte: a ``PatientStorage``.
        compares: Compares what it reads with digests of pieces of files: a ``ComparingStorage``. Core then compares no
            digests of whole files while it loads.
        diagnosis: Reports its endpoint and its credentials to ``mx doctor``: a ``DiagnosableStorage``.
        restriction: Tells whether a place is for some readers alone: a ``RestrictedStorage``.
        stat_digests: ``stat`` may return digests that ``list`` does not: core sends one request per file for them.
        global_versions: The version of an object is the same for every reader on every machine, and another for other
            content, as ETags and generations are: it tells which workers hold the same content.
        concurrency: Number of concurrent reads at the start of a load.
        most_concurrency: Upper bound of concurrent reads.
        request_cost_bytes: Cost of one more request, as the bytes that could be read in the same time.
            Gaps up to this size are read and discarded, rather than skipped.
        run_cost_bytes: Cost of one more run of ``read_runs``, likewise; by default that of a request.
    """

    read_batch: bool = False
    read_runs: bool = False
    recheck: bool = False
    patience: bool = False
    compares: bool = False
    diagnosis: bool = False
    restriction: bool = False
    stat_digests: bool = False
    global_versions: bool = False
    concurrency: int = field(default=8, validator=attrs.validators.ge(1))
    most_concurrency: int = field(default=64, validator=attrs.validators.ge(1))
    request_cost_bytes: int = field(default=256 << 10, validator=attrs.validators.ge(0))
    run_cost_bytes: int | None = field(default=None, validator=attrs.validators.optional(attrs.validators.ge(0)))

    def __attrs_post_init__(self) -> None:
        if self.read_batch and self.read_runs:
            message = "read_batch and read_runs exclude each other; declare one of them"
            raise ValueError(message)


@frozen
class SchemeProvider:
    """The base of the records that are selected by URI scheme.

    Attributes:
        name: Name of the provider, usually that of the distribution.
        schemes: Lower-case URI schemes that it handles.
        factory: Called as ``factory(uri, settings)`` at first use, with the parsed URI and a mapping of
            environment variables. It imports the SDK.
        alternative: Whether it is used only if ``MX_PREFER`` names it. An alternative never conflicts with others.
        install_hint: Argument of ``pip install`` for a missing SDK.
        api_version: Version of the hook contract that the plugin was written for.
        settings: Settings class that the factory reads, or a tuple of several: ``mx settings`` shows its variables.
    """

    name: str = field(validator=_check_name)
    schemes: tuple[str, ...] = field(converter=_scheme_tuple)
    factory: Callable[[ModelURI, Mapping[str, str]], Any] = field(validator=_check_factory)
    alternative: bool = field(default=False, kw_only=True)
    install_hint: str | None = field(default=None, kw_only=True)
    api_version: int = field(default=API_VERSION, kw_only=True)
    settings: type | tuple[type, ...] | None = field(default=None, kw_only=True)


@frozen
class StorageProvider(SchemeProvider):
    """Reads checkpoint files: a ``SchemeProvider`` whose factory returns a ``Storage``.

    Attributes:
        tier: Position of its candidates in the order of attempts: ``CACHE`` or ``ORIGIN``.
        capabilities: The optional methods of the storage, and the cost of its reads.
        needs_regular: Whether the factory takes a third argument: the storage that the scheme's regular plugin opens
            for the same URI and settings. The storage of the factory uses it, and closes it. For alternatives only.
    """

    factory: Callable[..., Storage] = field(validator=_check_factory)
    tier: Tier = field(default=Tier.ORIGIN, converter=Tier, validator=_check_file_tier, kw_only=True)
    capabilities: StorageCapabilities = field(factory=StorageCapabilities, kw_only=True)
    needs_regular: bool = field(default=False, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.needs_regular and not self.alternative:
            message = f"{self.name} needs the regular plugin of its scheme, so it must be alternative=True"
            raise ValueError(message)


#: Called with a peer and the environment variables of the load; returns ``FABRIC_PEER``, ``PEER`` or ``OTHER_PEER``.
PeerTier: TypeAlias = Callable[[Peer, Mapping[str, str]], Tier]


@frozen
class TransportProvider(SchemeProvider):
    """Reads tensors from the memory of a worker: a ``SchemeProvider`` whose factory returns a ``Transport``.

    Attributes:
        tier: Position of its peers in the order of attempts: ``FABRIC_PEER``, ``PEER`` or ``OTHER_PEER``; or a function
            that returns the position of one peer, by what that worker publishes and by this host. It is called before
            each load, for every peer that a discovery lists, so it must be fast and open no connection. What it gets
            comes from strangers.
        assumed: Whether it reads workers that do not publish which transports they support.
        offered: Whether workers offer their tensors over it unless their program names the transports; or a function
            that is called with the environment variables of the offer, and returns this.
    """

    factory: Callable[[ModelURI, Mapping[str, str]], Transport] = field(validator=_check_factory)
    tier: Tier | PeerTier = field(
        default=Tier.OTHER_PEER, converter=_tier_or_function, validator=_check_peer_tier, kw_only=True
    )
    assumed: bool = field(default=False, kw_only=True)
    offered: bool | Callable[[Mapping[str, str]], bool] = field(default=True, kw_only=True)

    def is_offered(self, environ: Mapping[str, str]) -> bool:
        """Whether workers with these environment variables offer their tensors over it by default."""
        return self.offered(environ) if callable(self.offered) else self.offered

    def tier_of(self, peer: Peer | None, environ: Mapping[str, str]) -> Tier:
        """Position of one peer in the order of attempts; ``OTHER_PEER`` if only its facts tell, and they are unknown.

        Args:
            peer: The worker; None if nothing but its address is known.
            environ: Variables of the load.

        Raises:
            ValueError: The function of the plugin returned something else. Whatever it raises is raised as well.
        """
        if isinstance(self.tier, Tier):
            return self.tier
        if peer is None:
            return Tier.OTHER_PEER
        found = Tier(self.tier(peer, environ))
        _check_peer_tier(self, attrs.fields(TransportProvider).tier, found)
        return found


@frozen
class DiscoveryProvider(SchemeProvider):
    """Finds the workers and places that hold a model: a ``SchemeProvider`` whose factory returns a ``Discovery``."""

    factory: Callable[[ModelURI, Mapping[str, str]], Discovery] = field(validator=_check_factory)


@frozen
class MetadataStoreProvider(SchemeProvider):
    """Keeps a server's metadata: a ``SchemeProvider`` whose factory returns a ``MetadataStore``."""

    factory: Callable[[ModelURI, Mapping[str, str]], MetadataStore] = field(validator=_check_factory)


@frozen
class AuthenticatorProvider:
    """Names the callers of servers and workers.

    Attributes:
        name: The value of ``MX_AUTH_MODE`` that selects it.
        factory: Called as ``factory(settings)`` when a server starts, with a mapping of environment variables. Returns
            an ``Authenticator``. It imports the SDK.
        install_hint: Argument of ``pip install`` for a missing SDK.
        api_version: Version of the hook contract that the plugin was written for.
        settings: Settings class that the factory reads, or a tuple of several: ``mx settings`` shows its variables.
    """

    name: str = field(validator=_check_name)
    factory: Callable[[Mapping[str, str]], Authenticator] = field(validator=_check_factory)
    install_hint: str | None = field(default=None, kw_only=True)
    api_version: int = field(default=API_VERSION, kw_only=True)
    settings: type | tuple[type, ...] | None = field(default=None, kw_only=True)


@frozen
class ServerServiceProvider:
    """A gRPC service that ``mx serve`` offers in addition to its own.

    The standard health service lists it. Its calls are logged, traced and counted like those of the server's services.

    Attributes:
        name: Full gRPC service name.
        factory: Called once as ``factory(context)`` when the server starts, in its event loop, with a
            ``ServiceContext``. Returns a ``grpc.GenericRpcHandler`` for methods of ``name``, which are coroutines or
            asynchronous generators. If it fails, the server does not start. It imports the SDK.
        api_version: Version of the hook contract that the plugin was written for.
        settings: Settings class that the factory reads, or a tuple of several: ``mx settings`` shows its variables.
    """

    name: str = field(validator=_check_name)
    factory: Callable[[ServiceContext], Any] = field(validator=_check_factory)
    api_version: int = field(default=API_VERSION, kw_only=True)
    settings: type | tuple[type, ...] | None = field(default=None, kw_only=True)


@frozen
class CommandProvider:
    """A subcommand of ``mx``.

    Attributes:
        name: The word after ``mx``.
        factory: Called without arguments when the command line is built. Returns a ``typer.Typer`` (a group of
            commands) or a function that typer turns into a command.
        help: One line for ``mx --help``.
        api_version: Version of the hook contract that the plugin was written for.
        settings: Settings class that it reads, or a tuple of several: ``mx settings`` shows its variables.
    """

    name: str = field(validator=_check_name)
    factory: Callable[[], Any] = field(validator=_check_factory)
    help: str = field(default="", kw_only=True)
    api_version: int = field(default=API_VERSION, kw_only=True)
    settings: type | tuple[type, ...] | None = field(default=None, kw_only=True)
