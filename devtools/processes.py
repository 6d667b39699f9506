"""Starts server processes, and ends them with the program that started them, even if that is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["end_with_parent", "start_patiently", "started"]

_STARTS = 3

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def end_with_parent() -> None:
    """For ``preexec_fn``: kill this process when the thread that started it ends, as pytest-xdist does on Ctrl-C."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def started(
    command: Sequence[str], directory: Path, environ: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a server in ``directory``, whose file ``log`` gets what it prints. It ends with this process.

    Args:
        command: Program and arguments.
        directory: Its working directory.
        environ: Variables besides those of this process.
    """
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={**os.environ, **(environ or {})},
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - it calls nothing that takes a lock
        )


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
