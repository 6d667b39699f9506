"""Plugins: their kinds, how they are found, loaded one by one, and opened."""

from __future__ import annotations

from modelexpress_core.plugins.entry_points import CORE, ENTRY_POINT_GROUP, plugin_packages
from modelexpress_core.plugins.kinds import (
    AUTHENTICATOR,
    COMMAND,
    DISCOVERY,
    KINDS,
    METADATA_STORE,
    SERVER_SERVICE,
    STORAGE,
    TRANSPORT,
    Kind,
)
from modelexpress_core.plugins.manager import PluginManager

__all__ = [
    "AUTHENTICATOR",
    "COMMAND",
    "CORE",
    "DISCOVERY",
    "ENTRY_POINT_GROUP",
    "KINDS",
    "METADATA_STORE",
    "SERVER_SERVICE",
    "STORAGE",
    "TRANSPORT",
    "Kind",
    "PluginManager",
    "plugin_packages",
]
