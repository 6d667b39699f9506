"""Plugins: finding them, loading each on its own, and asking them."""

from __future__ import annotations

from modelexpress_core.plugins.manager import CORE, ENTRY_POINT_GROUP, PluginManager

__all__ = ["CORE", "ENTRY_POINT_GROUP", "PluginManager"]
