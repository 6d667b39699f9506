"""The markers that plugins use; imports nothing but pluggy."""

from __future__ import annotations

import pluggy

__all__ = ["PROJECT_NAME", "hookimpl", "hookspec"]

#: Name under which pluggy keeps our hooks.
PROJECT_NAME = "modelexpress"

#: Marks a function of a plugin as the implementation of a hook.
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)

#: Marks the specification of a hook (only ``modelexpress_core.hookspecs`` uses it).
hookspec = pluggy.HookspecMarker(PROJECT_NAME)
