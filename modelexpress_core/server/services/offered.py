"""The services that a server offers: those of core and of other plugins, each under its own name and no other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import grpc
import grpc.aio

from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.errors import ModelExpressError, PluginConflictError, PluginLoadError
from modelexpress_core.plugins import CORE
from modelexpress_core.providers import ServerServiceProvider
from modelexpress_core.registry import Registered
from modelexpress_core.wire.rpc import STANDARD_HEALTH

__all__ = ["OfferedServices"]

#: The full name of a service, as proto files write it.
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)

_SERVER = "the server itself"


class OfferedServices:
    """The services that plugins register.

    Args:
        records: The records. Those of core come first, so that no other plugin takes their names.

    Attributes:
        names: Names of the services.

    Raises:
        PluginLoadError: By the constructor, for a name that is none.
        PluginConflictError: By the constructor, for a name that is the server's own, or that two plugins have.
    """

    def __init__(self, records: Iterable[Registered[ServerServiceProvider]]) -> None:
        self._records = sorted(records, key=lambda record: record.plugin.name != CORE)
        owners = {STANDARD_HEALTH.name: _SERVER}
        for record in self._records:
            name, plugin = record.provider.name, record.plugin.name
            if not _NAME.fullmatch(name):
                message = f"{plugin} offers a service under {name!r}, which is no full name of one"
                raise PluginLoadError(message, plugin=plugin, hint="write package.Service, as the proto file has it")
            if name in owners:
                message = f"{plugin} offers the service {name}, which {owners[name]} has already"
                raise PluginConflictError(message, plugin=plugin, hint=_without(plugin))
            owners[name] = _SERVER if plugin == CORE else plugin
        self.names = tuple(record.provider.name for record in self._records)

    def make(self, context: ServiceContext) -> Mapping[str, grpc.GenericRpcHandler[Any, Any]]:
        """Call the factories.

        Returns:
            What they return, by the name of the service.

        Raises:
            PluginLoadError: A factory fails, or returns something else.
        """
        return {record.provider.name: _make(record, context) for record in self._records}


def _make(record: Registered[ServerServiceProvider], context: ServiceContext) -> grpc.GenericRpcHandler[Any, Any]:
    name, plugin = record.provider.name, record.plugin.name
    what = f"the service {name} of the plugin {plugin}"
    try:
        product = record.provider.factory(context)
    except Exception as exc:
        reason = exc.message if isinstance(exc, ModelExpressError) else f"{type(exc).__name__}: {exc}"
        hint = getattr(exc, "hint", None) or _without(plugin)
        raise PluginLoadError(f"{what} cannot be made: {reason}", plugin=plugin, hint=hint) from exc
    if not isinstance(product, grpc.GenericRpcHandler):
        message = f"the factory of {what} returned {type(product).__name__}, which is no grpc.GenericRpcHandler"
        hint = "return grpc.method_handlers_generic_handler(name, handlers), or context.handler(add, servicer)"
        raise PluginLoadError(message, plugin=plugin, hint=hint)
    if isinstance(product, grpc.ServiceRpcHandler) and product.service_name() != name:
        message = f"the factory of {what} returned what answers for {product.service_name()}"
        raise PluginLoadError(message, plugin=plugin, hint="give the record the name that the proto file has")
    return product


def _without(plugin: str) -> str:
    return f"MX_DISABLED_PLUGINS={plugin} goes on without it"
