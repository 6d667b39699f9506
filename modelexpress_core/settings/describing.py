"""Showing settings: each with its value, the source of the value, and its problem if it cannot be used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from attrs import frozen

from modelexpress_core.errors import SettingsError
from modelexpress_core.messages import hide_credentials
from modelexpress_core.settings.declaring import field_names, fields
from modelexpress_core.settings.provenance import SettingSources
from modelexpress_core.settings.reading import read

__all__ = ["SettingValue", "describe"]

_T = TypeVar("_T")


@frozen
class SettingValue:
    """One setting as ``mx settings`` shows it.

    Attributes:
        name: The variable.
        aliases: Other variables, read if ``name`` is not set.
        value: Its value as text; ``"***"`` for a secret that is set.
        source: Where the value comes from: a variable, a flag, a line of a file, or ``"default"``.
        help: What it does.
        owner: The distribution that reads it.
        problem: Why the value cannot be used; empty if it can.
    """

    name: str
    aliases: tuple[str, ...]
    value: str
    source: str
    help: str
    owner: str
    problem: str = ""


def describe(cls: type, environ: Mapping[str, str] | SettingSources, *, owner: str) -> tuple[SettingValue, ...]:
    """Every setting of ``cls`` with its value in ``environ``, the source of the value, and its problem, if any."""
    reading = read(cls, environ if isinstance(environ, SettingSources) else SettingSources(environ))
    problems = {name: reading.problem(name) for name in field_names(cls)}
    settings: Any
    settings, conflicts = _largest_usable(cls, reading.values)
    problems |= {name: problems[name] or problem for name, problem in conflicts.items()}
    rows = []
    for attribute, variable in fields(cls):
        problem = problems[attribute.name]
        # Of a value that cannot be used, the source is its variable or line.
        source = next((location for name, location in reading.problems if name == attribute.name), None)
        source = source or reading.origins.get(attribute.name)
        hidden = variable.secret or problem  # a value that cannot be read may be a misplaced secret
        to_text = variable.shown if variable.shown and source else _to_text
        value = to_text(getattr(settings, attribute.name)) if not hidden else "***" if source else ""
        name, *aliases = variable.names
        rows.append(SettingValue(name, tuple(aliases), value, source or "default", variable.help, owner, problem))
    return tuple(rows)


def _largest_usable(cls: type[_T], values: Mapping[str, Any]) -> tuple[_T, Mapping[str, str]]:
    """An instance of ``cls`` of those ``values`` that fit together, and the problems of the others, by field."""
    problems: dict[str, str] = {}
    while True:
        try:
            return cls(**values), problems
        except SettingsError as exc:  # a condition of the class itself; the message names variables
            if not values:
                raise
            words = set(re.findall(r"\w+", exc.message))
            named = {attribute.name for attribute, variable in fields(cls) if words.intersection(variable.names)}
            if named.isdisjoint(values):
                named = set(values)
            problems |= dict.fromkeys(named - set(problems), exc.message)
            values = {name: value for name, value in values.items() if name not in named}


def _to_text(value: object) -> str:
    """``value`` as a variable has it. Of a URL in a field of any kind, credentials are hidden: it may be misplaced."""
    if isinstance(value, Mapping):
        return ",".join(hide_credentials(f"{k}={v}") for k, v in value.items())
    if isinstance(value, tuple):
        return ",".join(hide_credentials(str(each)) for each in value)
    return "" if value is None else hide_credentials(str(value))
