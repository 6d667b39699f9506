"""The variables that factories of plugins get: those of the process, with the values that flags and the file set."""

from __future__ import annotations

from collections.abc import Mapping

from modelexpress_core.settings.declaring import fields

__all__ = ["with_settings"]


def with_settings(environ: Mapping[str, str], *settings: object) -> Mapping[str, str]:
    """``environ`` with the values of ``settings``, instances of settings classes, in place of their variables.

    A factory that reads such a setting with ``from_env`` gets what the server itself uses, wherever it was set.
    """
    merged = dict(environ)
    for each in settings:
        for attribute, variable in fields(type(each)):
            value = getattr(each, attribute.name)
            for name in variable.names:
                merged.pop(name, None)
            if value is not None:
                merged[variable.names[0]] = ",".join(value) if isinstance(value, tuple) else str(value)
    return merged
