"""Starts server processes, and ends them with the program that started them, even if that is killed."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable

__all__ = ["end_with_parent", "start_patiently"]

_STARTS = 3

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def end_with_parent() -> None:
    """For ``preexec_fn``: kill this process when the thread that started it ends, as pytest-xdist does on Ctrl-C."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start_patiently(start: Callable[[], None], stop: Callable[[], None], error: type[Exception]) -> None:
    """Call ``start``, several times if it raises ``error``: another process may take a port that was free before.

    Args:
        start: Starts the server, and waits until it answers.
        stop: Ends what was started; called after each failure.
        error: What ``start`` raises if the server did not start.
    """
    for attempt in range(1, _STARTS + 1):
        try:
            start()
        except error:
            stop()
            if attempt == _STARTS:
                raise
        except BaseException:
            stop()
            raise
        else:
            return
