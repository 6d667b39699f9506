"""Skipping what needs a tool that this machine lacks. Tools of ``devtools`` that are missing skip a test themselves."""

from __future__ import annotations

from typing import NoReturn

import pytest

__all__ = ["MISSING_TOOL", "skip_without"]

#: The reason of such a skip begins with this; ``--require-tools`` fails the test instead.
MISSING_TOOL = "missing tool: "


def skip_without(tool: str) -> NoReturn:
    """Skip the current test for want of ``tool``, which says how to install it, too."""
    pytest.skip(MISSING_TOOL + tool)
