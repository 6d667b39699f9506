"""Plugin managers with the plugins that a test names, and none of those that are installed."""

from __future__ import annotations

from modelexpress_core import plugin as core_plugin
from modelexpress_core.plugins import CORE, PluginManager

__all__ = ["core_and"]


def core_and(**plugins: object) -> PluginManager:
    """Core's own plugin and ``plugins``, by name: ``mx_acme`` is the distribution ``mx-acme``."""
    manager = PluginManager()
    manager.register(core_plugin, name=CORE)
    for name, plugin in plugins.items():
        manager.register(plugin, name=name.replace("_", "-"))
    return manager
