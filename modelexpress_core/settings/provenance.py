"""Where the value of a setting comes from: a flag, a variable, a file, or what replaces a default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from attrs import frozen

__all__ = ["FileValue", "Override", "SettingSources"]


@frozen
class Override:
    """A value that needs no conversion: of a flag, or one that replaces a default.

    Attributes:
        value: The value of the field.
        source: Its source, for people: ``"--port"``.
    """

    value: Any = attrs.field(repr=False)
    source: str


@frozen
class FileValue:
    """The value of a field in a file.

    Attributes:
        value: As a reader of YAML, JSON or TOML returns it: text, number, switch, list or mapping.
        key: Its key in the file, for messages: ``"log.level"``.
        location: The file and the line, for messages: ``"mx.yaml, line 3"``.
        switch_text: The text of a switch (``"off"``), which may be a word of several; None for other values.
    """

    value: object = attrs.field(repr=False)
    key: str
    location: str
    switch_text: str | None = attrs.field(default=None, repr=False)


@frozen
class SettingSources:
    """The sources of the fields of a settings class. The first that has a value wins, in this order.

    Attributes:
        overrides: Flags, by field.
        environ: Variables.
        file_values: Values of a file, by field.
        fallbacks: Values that replace defaults, by field.
    """

    environ: Mapping[str, str] = attrs.field(repr=False)  # it may hold secrets
    overrides: Mapping[str, Override] = attrs.field(factory=dict, kw_only=True)
    file_values: Mapping[str, FileValue] = attrs.field(factory=dict, kw_only=True)
    fallbacks: Mapping[str, Override] = attrs.field(factory=dict, kw_only=True)
