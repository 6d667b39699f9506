"""``mx settings``: every variable that is read, its value, and where that came from."""

from __future__ import annotations

import os

import attrs
from rich.markup import escape
from rich.table import Table

from modelexpress_core.cli.output import JsonOption, console, print_json
from modelexpress_core.plugins import CORE, PluginManager
from modelexpress_core.settings import CORE_SETTINGS, SettingValue, describe

__all__ = ["settings"]


def settings(json_output: JsonOption = False) -> None:
    """List every setting, its value and where it came from; secrets are hidden."""
    manager = PluginManager.discover()
    classes = [*((CORE, cls) for cls in CORE_SETTINGS), *manager.settings_classes()]
    values = [value for owner, cls in classes for value in describe(cls, os.environ, owner=owner)]
    if json_output:
        print_json([attrs.asdict(value) for value in values])
    else:
        _print(values)


def _print(values: list[SettingValue]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    table.add_column("what it does")
    table.add_column("read by")
    for value in values:
        is_set = value.source != "default"
        name = value.name if not value.aliases else f"{value.name} (also {', '.join(value.aliases)})"
        shown = escape(value.value) if value.value else "[dim]not set[/]"
        table.add_row(
            f"[bold]{escape(name)}[/]" if is_set else escape(name),
            shown,
            escape(value.source),
            escape(value.help),
            escape(value.owner),
        )
    console().print(table)
