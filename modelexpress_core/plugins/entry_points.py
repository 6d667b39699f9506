"""The entry points of installed plugins, in all distributions."""

from __future__ import annotations

import importlib.metadata
import logging
import re

from attrs import frozen

from modelexpress_core.errors import PluginLoadError
from modelexpress_core.plugins.reasons import reason_of

__all__ = ["CORE", "ENTRY_POINT_GROUP", "PluginEntryPoint", "installed_entry_points", "normalised", "plugin_packages"]

_log = logging.getLogger(__name__)

#: The entry-point group of plugins.
ENTRY_POINT_GROUP = "modelexpress.plugins"

#: Name of core's own plugin.
CORE = "modelexpress-core"


@frozen
class PluginEntryPoint:
    """An entry point with its distribution, or the error of a distribution that cannot be read."""

    entry_point: importlib.metadata.EntryPoint
    distribution: str
    version: str
    error: Exception | None = None

    @property
    def well_named(self) -> bool:
        """Whether the entry point has the name of its distribution, which users disable the plugin by."""
        return normalised(self.entry_point.name) == normalised(self.distribution)

    @property
    def order(self) -> tuple[bool, bool, str, str]:
        """Sort key: by name, with core last, so that its ``trylast`` defaults come after those of plugins."""
        name = normalised(self.distribution)
        return not self.well_named, name == CORE, name, self.entry_point.name


def normalised(name: str) -> str:
    """``name`` normalised as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_entry_points() -> list[PluginEntryPoint]:
    """Every entry point of our group. If the path has a distribution twice, the first counts, as for imports."""
    found, seen = [], set()
    for distribution in importlib.metadata.distributions():
        try:
            metadata = distribution.metadata
            name = metadata["Name"] if "Name" in metadata else ""  # noqa: SIM401 - get came with 3.12
        except Exception as exc:  # noqa: BLE001 - faults of other packages are not ours to report
            _log.debug("ignoring a distribution whose metadata cannot be read: %s", exc)
            continue
        if not name or normalised(name) in seen:
            continue
        seen.add(normalised(name))
        found += _entry_points_of(distribution, name)
    return found


def plugin_packages() -> list[str]:
    """The packages of installed plugins, after which their loggers are named: ``mx_acme`` of ``mx_acme.plugin``."""
    modules = {found.entry_point.module for found in installed_entry_points() if found.error is None}
    return sorted(module.rpartition(".")[0] or module for module in modules)


def _entry_points_of(distribution: importlib.metadata.Distribution, name: str) -> list[PluginEntryPoint]:
    """The entry points of our group in ``distribution``."""
    try:
        entry_points = [point for point in distribution.entry_points if point.group == ENTRY_POINT_GROUP]
        return [PluginEntryPoint(point, name, distribution.version) for point in entry_points]
    except Exception as exc:  # noqa: BLE001 - one unreadable file must not hide all plugins
        try:
            text = distribution.read_text("entry_points.txt") or ""
        except UnicodeDecodeError as undecodable:
            text = repr(undecodable.object)
        if ENTRY_POINT_GROUP not in text:
            return []
        message = f"the entry_points.txt of {name} cannot be read: {reason_of(exc)}"
        error = PluginLoadError(message, plugin=name, hint=f"reinstall {name}")
        return [PluginEntryPoint(importlib.metadata.EntryPoint(name, "", ENTRY_POINT_GROUP), name, "", error)]
