"""Ends server processes with the program that started them, even if that is killed."""

from __future__ import annotations

import ctypes
import signal

__all__ = ["end_with_parent"]

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def end_with_parent() -> None:
    """For ``preexec_fn``: kill this process when the thread that started it ends, as pytest-xdist does on Ctrl-C."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
