"""Starts programs that react to Ctrl-C, also where the tests themselves run in the background.

A shell without job control starts background programs with SIGINT ignored, and children inherit that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["with_default_signals"]

_PROGRAM = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def with_default_signals(command: Sequence[str]) -> list[str]:
    """``command``, in a process that SIGINT and SIGTERM end unless it handles them."""
    return [sys.executable, "-I", "-S", "-c", _PROGRAM, *command]
