"""How settings are declared and read: frozen attrs classes whose fields name their variable.

A program reads each settings class once, when it starts, from a mapping that is usually the process environment.
Nothing is read at import, and nothing changes later::

    @frozen
    class MySettings:
        timeout_seconds: float = env("MX_MY_TIMEOUT", default=10.0, converter=seconds, help="...")


    settings = from_env(MySettings, os.environ)

A program that also has flags and a file reads from ``SettingSources``: ``from_sources(MySettings, sources)``.
The settings of core itself are in ``modelexpress_core.settings.core``.
"""

from __future__ import annotations

from modelexpress_core.settings.converters import (
    boolean,
    buffer_bytes,
    byte_count,
    names,
    one_of,
    pairs,
    positive_integer,
    seconds,
    tcp_port,
)
from modelexpress_core.settings.core import CORE_SETTINGS, LoadSettings, PluginSettings
from modelexpress_core.settings.declaring import env, field_names, variables
from modelexpress_core.settings.describing import SettingValue, describe
from modelexpress_core.settings.provenance import FileValue, Override, SettingSources
from modelexpress_core.settings.reading import find_problems, from_env, from_sources, usable_values
from modelexpress_core.settings.unknown import warn_unknown_variables

__all__ = [
    "CORE_SETTINGS",
    "FileValue",
    "LoadSettings",
    "Override",
    "PluginSettings",
    "SettingSources",
    "SettingValue",
    "boolean",
    "buffer_bytes",
    "byte_count",
    "describe",
    "env",
    "field_names",
    "find_problems",
    "from_env",
    "from_sources",
    "names",
    "one_of",
    "pairs",
    "positive_integer",
    "seconds",
    "tcp_port",
    "usable_values",
    "variables",
    "warn_unknown_variables",
]
