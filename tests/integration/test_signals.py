"""Ctrl-C ends every command with exit code 130, SIGTERM with 143, and with no traceback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import Commands
from tests.support.signals import with_default_signals

pytestmark = pytest.mark.slow

_START_SECONDS = 120


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(_START_SECONDS)
        yield listening


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "command",
    [
        ("load", "s3://bucket/model"),
        ("inspect", "s3://bucket/model"),
        ("pull", "s3://bucket/model", "OUT"),
        ("doctor", "s3://bucket/model", "--timeout", "60"),
        ("health",),
        ("sources",),
        ("sources", "--watch"),
        ("explain", "s3://bucket/model"),
    ],
    ids=" ".join,
)
def test_a_signal_ends_a_command_that_waits(
    number: int, command: tuple[str, ...], silent: socket.socket, commands: Commands, tmp_path: Path
) -> None:
    """For a server that says nothing."""
    port = silent.getsockname()[1]
    arguments = [str(tmp_path / "out") if argument == "OUT" else argument for argument in command]
    environ = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "MODEL_EXPRESS_URL": f"127.0.0.1:{port}",
        "MX_SERVER_DEADLINE_SECONDS": "100",
    }
    process = commands.start(arguments, {**os.environ, "HOME": str(tmp_path), **environ})
    try:
        connection, _ = silent.accept()
        with connection:
            connection.recv(1)  # so it waits for the answer
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
    finally:
        process.kill()

    assert 128 + number == process.wait(), said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_that_is_still_starting(number: int, silent: socket.socket, tmp_path: Path) -> None:
    """While it imports plugins, one of which waits."""
    (tmp_path / "waiting.py").write_text(
        f"import socket\nsocket.create_connection(('127.0.0.1', {silent.getsockname()[1]})).recv(1)\n"
    )
    info = tmp_path / "waiting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: waiting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modelexpress.plugins]\nwaiting = waiting\n")
    process = subprocess.Popen(
        with_default_signals([sys.executable, "-m", "modelexpress_core", "plugins"]),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        connection, _ = silent.accept()
        with connection:
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
    finally:
        process.kill()

    assert 128 + number == process.wait(), said
    assert "Interrupted" in said
    assert "Traceback" not in said


def test_sigterm_that_was_ignored_before_stays_ignored(silent: socket.socket, tmp_path: Path) -> None:
    """As after ``trap '' TERM`` in a script."""
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'modelexpress_core', *sys.argv[1:]])\n"
    )
    process = subprocess.Popen(
        with_default_signals(
            [sys.executable, "-c", program, "health", "--url", f"127.0.0.1:{silent.getsockname()[1]}"]
        ),
        env={**os.environ, "HOME": str(tmp_path), "MX_SERVER_DEADLINE_SECONDS": "100"},
        stderr=subprocess.PIPE,
    )
    try:
        connection, _ = silent.accept()
        with connection:
            connection.recv(1)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    finally:
        process.kill()

    assert 128 + signal.SIGINT == process.wait()
