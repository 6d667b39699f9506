"""``mx settings``: lists every setting, its value, and the source of the value."""

from __future__ import annotations

import os
from itertools import groupby

import attrs
from rich.padding import Padding

from modelexpress_core.cli.output import JsonOption, console, print_json, verbatim
from modelexpress_core.errors import SettingsError
from modelexpress_core.plugins import CORE, PluginManager
from modelexpress_core.settings import CORE_SETTINGS, SettingValue, describe

__all__ = ["settings"]


def settings(json_output: JsonOption = False) -> None:
    """List every setting, its value and where it came from; secrets are hidden."""
    core = [value for cls in CORE_SETTINGS for value in describe(cls, os.environ, owner=CORE)]
    # An unusable variable of core must not prevent the plugins' settings from being listed.
    usable = {name: text for name, text in os.environ.items() if name not in _unusable(core)}
    plugins = PluginManager.discover({**usable, "MX_STRICT_PLUGINS": ""}).settings_classes()
    values = [*core, *(value for owner, cls in plugins for value in describe(cls, os.environ, owner=owner))]
    unusable = _unusable(values)
    if unusable and not json_output:
        _print(values)
    if unusable:
        # Settings that contradict each other share one problem.
        problems = "\n  ".join(dict.fromkeys(value.problem for value in values if value.problem))
        raise SettingsError(f"settings that cannot be used:\n  {problems}", hint="correct or unset them")
    if json_output:
        print_json([attrs.asdict(value) for value in values])
    else:
        _print(values)


def _unusable(values: list[SettingValue]) -> set[str]:
    return {value.source for value in values if value.problem}


def _print(values: list[SettingValue]) -> None:
    out = console()
    for owner, group in groupby(values, key=lambda value: value.owner):
        out.print(f"[bold underline]{verbatim(owner)}[/]")
        for value in group:
            shown = verbatim(value.value) if value.value else "[dim]not set[/]"
            source = "" if value.source == "default" else f" [dim](from {verbatim(value.source)})[/]"
            problem = " [red]cannot be used[/]" if value.problem else ""
            out.print(f"[bold]{verbatim(value.name)}[/] = {shown}{source}{problem}", soft_wrap=True)
            also = f" Also: {', '.join(value.aliases)}." if value.aliases else ""
            out.print(Padding(f"[dim]{verbatim(value.help)}{verbatim(also)}[/]", (0, 0, 0, 4)))
        out.print()
