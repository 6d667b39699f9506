"""Calling the factory of a record, and checking what it returns."""

from __future__ import annotations

from typing import Any, TypeVar

from modelexpress_core.errors import ModelExpressError, PluginLoadError
from modelexpress_core.installing import install_command
from modelexpress_core.plugins.kinds import Kind
from modelexpress_core.plugins.reasons import reason_of
from modelexpress_core.registry import Registered

__all__ = ["open_product"]

R = TypeVar("R")
T = TypeVar("T")


def open_product(kind: Kind[R, T], registered: Registered[Any], *arguments: object) -> T:
    """The object that the factory of ``registered`` returns for ``arguments``, after checking its methods.

    Raises:
        PluginLoadError: The factory failed with another error than ours, or returned an object of another kind.
        ModelExpressError: The factory raised it.
    """
    plugin, label = registered.plugin.name, registered.label
    what = registered.provider.install_hint or plugin
    what_for = str(arguments[0]) if kind.by_scheme else f"the {kind.word} {registered.provider.name}"
    try:
        product = registered.provider.factory(*arguments)
    except ModelExpressError:
        raise
    except ModuleNotFoundError as exc:
        message = f"{label} cannot be used for {what_for}: the package {exc.name or exc} is missing"
        raise PluginLoadError(message, plugin=plugin, hint=install_command(what)) from exc
    except ImportError as exc:
        message = f"{label} cannot be used for {what_for}: {reason_of(exc)}"
        cause = "the installed version of the package does not fit the plugin"
        hint = install_command(what, upgrade=True)
        raise PluginLoadError(message, plugin=plugin, cause=cause, hint=hint) from exc
    except Exception as exc:
        message = f"{label} failed to open {what_for}: {reason_of(exc)}"
        raise PluginLoadError(message, plugin=plugin, hint="report it to its authors") from exc
    lacking = [method for method in kind.methods if not callable(getattr(product, method, None))]
    if lacking or isinstance(product, type):
        returned = "a class, not an instance" if isinstance(product, type) else type(product).__name__
        message = f"the factory of {label} returned {returned}, which is no {kind.word}"
        cause = f"it has no {', '.join(lacking)}" if lacking else "have you forgotten the ()?"
        raise PluginLoadError(message, plugin=plugin, cause=cause, hint=f"return an open {kind.word} from it")
    opened: T = product
    return opened
