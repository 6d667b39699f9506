"""Exit codes of commands that a signal ends: 130 for Ctrl-C (SIGINT), 143 for SIGTERM, as shells have them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["TerminatedError", "exit_codes_of_signals", "signal_exit_code"]

_SIGNAL_BASE = 128


class TerminatedError(KeyboardInterrupt):
    """SIGTERM came. What handles Ctrl-C handles it, too."""


def signal_exit_code(ended_by: int | KeyboardInterrupt) -> int:
    """The exit code of a command that was ended by this signal, or by the signal that raised this exception."""
    if isinstance(ended_by, KeyboardInterrupt):
        ended_by = signal.SIGTERM if isinstance(ended_by, TerminatedError) else signal.SIGINT
    return _SIGNAL_BASE + ended_by


@contextmanager
def exit_codes_of_signals() -> Iterator[None]:
    """Raise ``TerminatedError`` on SIGTERM within the block, and exit with the code of the signal that ended it.

    A command then ends in an orderly way on SIGTERM, also as the first process of a container, where the system ignores
    signals that have no handler. Whoever started the process with SIGTERM ignored wants that to stay.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as exc:  # while the commands are imported, say
        sys.stderr.write("Interrupted.\n")
        sys.exit(signal_exit_code(exc))
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler's signature
    raise TerminatedError
