"""The error for a program or a file that this machine lacks; tests that need it are skipped."""

from __future__ import annotations

__all__ = ["ToolMissingError"]


class ToolMissingError(RuntimeError):
    """A tool is not installed. The message is ``"tool: how to install it"``."""
