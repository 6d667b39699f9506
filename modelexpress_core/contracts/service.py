"""What the factory of a gRPC service of the server is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from attrs import field, frozen

from modelexpress_core.contracts.metadata_store import MetadataStore

__all__ = ["ServiceContext"]


class _Collecting:
    """Stands for a server where generated code adds a service to one."""

    def __init__(self) -> None:
        self.handlers: list[Any] = []

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        """What serves the methods."""
        self.handlers += handlers

    def add_registered_method_handlers(self, name: str, handlers: Mapping[str, Any]) -> None:
        """The same once more, for servers that want them by name."""


@frozen
class ServiceContext:
    """What the factory of a service is given.

    Attributes:
        store: The server's metadata, whose methods are coroutines. The server closes it.
        settings: Variables.
        closing: What is pushed here is called at the end, after the last call, in reverse order.
    """

    store: MetadataStore
    settings: Mapping[str, str] = field(repr=False)  # the environment, where secrets are
    closing: AsyncExitStack

    def handler(self, add_to_server: Callable[[Any, Any], None], servicer: object) -> Any:  # noqa: ANN401 - of gRPC
        """What ``add_to_server``, an ``add_..._to_server`` that protoc generated, adds to a server for ``servicer``."""
        collecting = _Collecting()
        add_to_server(servicer, collecting)
        [handler] = collecting.handlers
        return handler
