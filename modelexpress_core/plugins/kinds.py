"""The kinds of plugin: one row for each register hook.

To add a kind, add a row here and the specification of its hook to ``hookspecs``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from attrs import frozen

from modelexpress_core.contracts.authenticator import Authenticator
from modelexpress_core.contracts.discovery import Discovery
from modelexpress_core.contracts.metadata_store import MetadataStore
from modelexpress_core.contracts.storage import Storage
from modelexpress_core.contracts.transport import Transport
from modelexpress_core.providers import (
    AuthenticatorProvider,
    CommandProvider,
    DiscoveryProvider,
    MetadataStoreProvider,
    SchemeProvider,
    ServerServiceProvider,
    StorageProvider,
    TransportProvider,
)

__all__ = [
    "AUTHENTICATOR",
    "COMMAND",
    "DISCOVERY",
    "KINDS",
    "METADATA_STORE",
    "SERVER_SERVICE",
    "STORAGE",
    "TRANSPORT",
    "Kind",
]

R = TypeVar("R")
T = TypeVar("T")


@frozen
class Kind(Generic[R, T]):
    """A kind of plugin.

    Attributes:
        hook: Name of the register hook that returns its records.
        word: Name of the kind in messages.
        record: Class of its records.
        methods: Methods that the object from the record's factory must have.
    """

    hook: str
    word: str
    record: type[R]
    methods: tuple[str, ...] = ()

    @property
    def by_scheme(self) -> bool:
        """Whether its records are selected by URI scheme; else by name."""
        return issubclass(self.record, SchemeProvider)


STORAGE: Kind[StorageProvider, Storage] = Kind(
    "mx_register_storages", "storage", StorageProvider, ("list", "stat", "read_into", "close")
)
TRANSPORT: Kind[TransportProvider, Transport] = Kind(
    "mx_register_transports", "transport", TransportProvider, ("serve", "connect", "close")
)
DISCOVERY: Kind[DiscoveryProvider, Discovery] = Kind(
    "mx_register_discoveries", "discovery", DiscoveryProvider, ("candidates", "close")
)
METADATA_STORE: Kind[MetadataStoreProvider, MetadataStore] = Kind(
    "mx_register_metadata_stores",
    "metadata store",
    MetadataStoreProvider,
    ("publish", "get", "list", "update", "reap", "counts", "lead", "check", "close"),
)
AUTHENTICATOR: Kind[AuthenticatorProvider, Authenticator] = Kind(
    "mx_register_authenticators", "authenticator", AuthenticatorProvider, ("authenticate",)
)
SERVER_SERVICE: Kind[ServerServiceProvider, Any] = Kind(
    "mx_register_server_services", "server service", ServerServiceProvider
)
COMMAND: Kind[CommandProvider, Callable[..., None]] = Kind("mx_register_commands", "command", CommandProvider)

#: All kinds, in the order in which their hooks are called.
KINDS: tuple[Kind[Any, Any], ...] = (
    STORAGE,
    TRANSPORT,
    DISCOVERY,
    METADATA_STORE,
    AUTHENTICATOR,
    SERVER_SERVICE,
    COMMAND,
)
