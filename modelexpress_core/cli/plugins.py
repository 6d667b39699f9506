"""``mx plugins``: lists the installed plugins, with the reasons why some are broken."""

from __future__ import annotations

import os

from rich.table import Table

from modelexpress_core.cli.output import JsonOption, console, print_json, verbatim, verbatim_lines
from modelexpress_core.errors import PluginConflictError
from modelexpress_core.plugins import PluginManager

__all__ = ["plugins"]

_STYLES = {"loaded": "green", "broken": "red", "disabled": "yellow"}


def plugins(json_output: JsonOption = False) -> None:
    """List every plugin: distribution, version, schemes, status, and the reason if it is broken."""
    # Strict mode would stop at the first broken plugin; this command lists all of them.
    manager = PluginManager.discover({**os.environ, "MX_STRICT_PLUGINS": ""})
    conflicts = [conflict for table in manager.tables() for conflict in table.conflicts()]
    if json_output:
        print_json(_as_data(manager, conflicts))
    else:
        _print(manager, conflicts)


def _as_data(manager: PluginManager, conflicts: list[PluginConflictError]) -> dict[str, object]:
    return {
        "plugins": [
            {
                "distribution": info.name,
                "version": info.version,
                "status": info.status,
                "reason": info.reason,
                "schemes": {kind: list(schemes) for kind, schemes in info.schemes.items()},
            }
            for info in manager.plugins
        ],
        "conflicts": [str(conflict) for conflict in conflicts],
    }


def _print(manager: PluginManager, conflicts: list[PluginConflictError]) -> None:
    out = console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("plugin", "version", "status"):
        table.add_column(column)
    table.add_column("schemes", overflow="fold")
    table.add_column("reason", overflow="fold")
    for info in manager.plugins:
        schemes = "; ".join(f"{kind}: {' '.join(names)}" for kind, names in info.schemes.items())
        status = f"[{_STYLES[info.status]}]{info.status}[/]"
        table.add_row(verbatim(info.name), verbatim(info.version), status, verbatim(schemes), verbatim(info.reason))
    out.print(table)
    for conflict in conflicts:
        out.print(f"\n[red]conflict[/] {verbatim_lines(str(conflict))}")
