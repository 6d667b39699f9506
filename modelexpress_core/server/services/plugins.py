"""Services that plugins offer beside the server's own: made at its start, each under its own name and no other."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import grpc
import grpc.aio

from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.errors import ModelExpressError, PluginConflictError, PluginLoadError
from modelexpress_core.providers import ServerServiceProvider

__all__ = ["PluginServices"]

_log = logging.getLogger(__name__)

#: The full name of a service, as proto files write it.
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


class PluginServices:
    """What plugins offer.

    Args:
        offered: The services, each with its distribution.
        taken: Names of the server's own.

    Attributes:
        names: Names of the services.

    Raises:
        PluginLoadError: By the constructor, where a name is none.
        PluginConflictError: By the constructor, where a name is the server's own, or two plugins have it.
    """

    def __init__(self, offered: Iterable[tuple[str, ServerServiceProvider]], taken: Collection[str]) -> None:
        self._offered = tuple(offered)
        owners = dict.fromkeys(taken, "the server itself")
        for plugin, service in self._offered:
            if not _NAME.fullmatch(service.name):
                message = f"{plugin} offers a service under {service.name!r}, which is no full name of one"
                raise PluginLoadError(message, plugin=plugin, hint="write package.Service, as the proto file has it")
            if service.name in owners:
                message = f"{plugin} offers the service {service.name}, which {owners[service.name]} has already"
                raise PluginConflictError(message, plugin=plugin, hint=_without(plugin))
            owners[service.name] = plugin
        self.names = tuple(service.name for _, service in self._offered)

    def make(self, context: ServiceContext) -> Sequence[grpc.GenericRpcHandler[Any, Any]]:
        """What the factories return.

        Raises:
            PluginLoadError: A factory fails, or returns something else.
        """
        return [self._made(plugin, service, context) for plugin, service in self._offered]

    def _made(
        self, plugin: str, service: ServerServiceProvider, context: ServiceContext
    ) -> grpc.GenericRpcHandler[Any, Any]:
        what = f"the service {service.name} of the plugin {plugin}"
        try:
            product = service.factory(context)
        except Exception as exc:
            reason = exc.message if isinstance(exc, ModelExpressError) else f"{type(exc).__name__}: {exc}"
            hint = getattr(exc, "hint", None) or _without(plugin)
            raise PluginLoadError(f"{what} cannot be made: {reason}", plugin=plugin, hint=hint) from exc
        if not isinstance(product, grpc.GenericRpcHandler):
            message = f"the factory of {what} returned {type(product).__name__}, which is no grpc.GenericRpcHandler"
            hint = "return grpc.method_handlers_generic_handler(name, handlers), or context.handler(add, servicer)"
            raise PluginLoadError(message, plugin=plugin, hint=hint)
        if isinstance(product, grpc.ServiceRpcHandler) and product.service_name() != service.name:
            message = f"the factory of {what} returned what answers for {product.service_name()}"
            raise PluginLoadError(message, plugin=plugin, hint="give the record the name that the proto file has")
        return _Guarded(service.name, product)


def _without(plugin: str) -> str:
    return f"MX_DISABLED_PLUGINS={plugin} goes on without it"


class _Guarded(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # it is generic in the annotations alone
    """``handler`` for the methods of one service, and of no other."""

    def __init__(self, name: str, handler: grpc.GenericRpcHandler[Any, Any]) -> None:
        self._start = f"/{name}/"
        self._handler = handler

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """What answers a call, or None."""
        path = handler_call_details.method
        return self._handler.service(handler_call_details) if path.startswith(self._start) else None
