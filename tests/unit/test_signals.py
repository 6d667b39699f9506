"""Tests of Ctrl-C mean something wherever the tests are started."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.support.signals import with_default_signals

#: As a shell without job control starts programs in the background.
_IGNORING = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""
_SHOWING = "import signal; print(signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)"


def reacts(command: Sequence[str]) -> bool:
    """Whether a child that shows it reacts to Ctrl-C, if its parent ignores that."""
    done = subprocess.run(
        [sys.executable, "-c", _IGNORING, *command], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout == "True\n"


@pytest.mark.slow
def test_a_child_reacts_to_ctrl_c_in_the_background() -> None:
    """Without the helper it inherits that Ctrl-C is ignored."""
    command = [sys.executable, "-c", _SHOWING]

    assert not reacts(command)
    assert reacts(with_default_signals(command))
