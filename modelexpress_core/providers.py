"""The records that register hooks return: what a plugin offers, and how to get it.

A record is data. Building one does no I/O and imports no SDK; the factory in it does, at first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from attrs import field, frozen

from modelexpress_core.contracts.authenticator import Authenticator
from modelexpress_core.contracts.candidates import Tier
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
    "SchemeProvider",
    "ServerServiceProvider",
    "StorageCapabilities",
    "StorageProvider",
    "TransportProvider",
]

#: Version of the hook contract. Raised when a plugin written for the old one would misbehave.
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
            message = f"{scheme!r} is no URI scheme: lower-case letters, digits, + . - after a letter"
            raise ValueError(message)
    if not listed:
        message = "a record needs at least one scheme"
        raise ValueError(message)
    if len(set(listed)) < len(listed):
        message = f"a scheme stands twice in {listed!r}"
        raise ValueError(message)
    return listed


def _check_factory(_record: object, _attribute: attrs.Attribute[Any], factory: object) -> None:
    if not callable(factory):
        message = f"factory is {factory!r}, which cannot be called; pass the function itself"
        raise TypeError(message)


def _check_peer_tier(_record: object, _attribute: attrs.Attribute[Tier], tier: Tier) -> None:
    if tier >= Tier.CACHE:
        message = f"the tier of a transport is that of a kind of peer, not {tier.name}"
        raise ValueError(message)


def _check_file_tier(_record: object, _attribute: attrs.Attribute[Tier], tier: Tier) -> None:
    if tier < Tier.CACHE:
        message = f"the tier of a storage is CACHE or ORIGIN, not {tier.name}"
        raise ValueError(message)


@frozen
class StorageCapabilities:
    """What a storage can do beyond the required, and what its reads cost.

    Attributes:
        read_batch: It has an engine of its own, behind ``read_batch``.
        read_runs: It reads many short runs in one call, with ``read_runs`` (see ``RunStorage``).
        patience: Its reads give up on a silent connection after ``patience_seconds`` (see ``PatientStorage``).
        diagnosis: It says where it connects and as whom (see ``DiagnosableStorage``).
        stat_digests: ``stat`` may tell digests that ``list`` leaves out: asking is worth a request for each file.
        concurrency: Reads in flight to begin with.
        most_concurrency: Reads in flight that are never exceeded, however much more they would bring.
        request_cost_bytes: What one more request costs, in bytes that could be read in the same time.
            Gaps up to this size are read through and thrown away rather than skipped.
    """

    read_batch: bool = False
    read_runs: bool = False
    patience: bool = False
    diagnosis: bool = False
    stat_digests: bool = False
    concurrency: int = field(default=8, validator=attrs.validators.ge(1))
    most_concurrency: int = field(default=64, validator=attrs.validators.ge(1))
    request_cost_bytes: int = field(default=256 << 10, validator=attrs.validators.ge(0))


@frozen
class SchemeProvider:
    """Fields that all records resolved by URI scheme have.

    Attributes:
        name: Name of the provider, usually the distribution's.
        schemes: Lower-case URI schemes that it handles.
        factory: Called as ``factory(uri, settings)`` at first use, with the parsed URI and a mapping of
            environment variables. SDKs are imported there.
        alternative: Only used where ``MX_PREFER`` names it, so it never conflicts.
        install_hint: What to install if the factory finds its SDK missing.
        api_version: The hook contract that it was written for.
        settings: Settings class that the factory reads, or several, for ``mx settings``.
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
    """A place that checkpoint files are read from; the factory returns a ``Storage``.

    Attributes:
        tier: When it is tried.
    """

    factory: Callable[[ModelURI, Mapping[str, str]], Storage] = field(validator=_check_factory)
    tier: Tier = field(default=Tier.ORIGIN, converter=Tier, validator=_check_file_tier, kw_only=True)
    capabilities: StorageCapabilities = field(factory=StorageCapabilities, kw_only=True)


@frozen
class TransportProvider(SchemeProvider):
    """A way to read tensors from the memory of a worker; the factory returns a ``Transport``.

    Attributes:
        tier: When its peers are tried.
        assumed: Workers that do not say which transports they speak are taken to speak this one.
    """

    factory: Callable[[ModelURI, Mapping[str, str]], Transport] = field(validator=_check_factory)
    tier: Tier = field(default=Tier.OTHER_PEER, converter=Tier, validator=_check_peer_tier, kw_only=True)
    assumed: bool = field(default=False, kw_only=True)


@frozen
class DiscoveryProvider(SchemeProvider):
    """Finds the peers and places that hold a model now; the factory returns a ``Discovery``."""

    factory: Callable[[ModelURI, Mapping[str, str]], Discovery] = field(validator=_check_factory)


@frozen
class MetadataStoreProvider(SchemeProvider):
    """Keeps the server's metadata; the factory returns a ``MetadataStore``."""

    factory: Callable[[ModelURI, Mapping[str, str]], MetadataStore] = field(validator=_check_factory)


@frozen
class AuthenticatorProvider:
    """A way to authenticate the calls that servers and workers answer.

    Attributes:
        name: The value of ``MX_AUTH_MODE`` that selects it.
        factory: Called as ``factory(settings)`` when a server starts, with a mapping of environment variables. Returns
            an ``Authenticator``. SDKs are imported there.
        install_hint: What to install if the factory finds its SDK missing.
        api_version: The hook contract that it was written for.
        settings: Settings class that the factory reads, or several, for ``mx settings``.
    """

    name: str = field(validator=_check_name)
    factory: Callable[[Mapping[str, str]], Authenticator] = field(validator=_check_factory)
    install_hint: str | None = field(default=None, kw_only=True)
    api_version: int = field(default=API_VERSION, kw_only=True)
    settings: type | tuple[type, ...] | None = field(default=None, kw_only=True)


@frozen
class ServerServiceProvider:
    """A gRPC service that ``mx serve`` also offers.

    It is offered in the standard health service, and its calls are logged, traced and counted as the server's own are.

    Attributes:
        name: Full gRPC service name.
        factory: Called once as ``factory(context)`` when the server starts, in its event loop, with a
            ``ServiceContext``. Returns a ``grpc.GenericRpcHandler`` for methods of ``name``, which are coroutines or
            asynchronous generators. If it fails, the server does not start. SDKs are imported there.
        api_version: The hook contract that it was written for.
        settings: Settings class that the factory reads, or several, for ``mx settings``.
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
        factory: Called without arguments when the command line is built; returns a ``typer.Typer`` (a group)
            or a function that typer turns into a command.
        help: One line for ``mx --help``.
        api_version: The hook contract that it was written for.
        settings: Settings class that it reads, or several, for ``mx settings``.
    """

    name: str = field(validator=_check_name)
    factory: Callable[[], Any] = field(validator=_check_factory)
    help: str = field(default="", kw_only=True)
    api_version: int = field(default=API_VERSION, kw_only=True)
    settings: type | tuple[type, ...] | None = field(default=None, kw_only=True)
