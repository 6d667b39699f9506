"""Copies of a process that has imported everything do what new programs do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.commands import Commands

pytestmark = pytest.mark.slow


def started_anew(arguments: list[str], environ: dict[str, str]) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "modelexpress_core", *arguments],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        (["--version"], {}),
        (["plugins", "--json"], {"MX_DISABLED_PLUGINS": "mx-s3"}),
        (["load", "/no/such/model"], {}),
        (["load"], {"COLUMNS": "70"}),
        (["settings"], {"MX_CONCURRENCY": "many", "MX_LOG_LEVEL": "debug"}),
    ],
)
def test_a_copy_prints_and_ends_like_a_program(
    arguments: list[str], environ: dict[str, str], commands: Commands, tmp_path: Path
) -> None:
    """With the variables that it gets, and with no other."""
    environ = {**os.environ, "HOME": str(tmp_path), **environ}

    done = commands.run(arguments, environ, timeout=60)

    assert commands.can_run(environ)
    assert started_anew(arguments, environ) == (done.returncode, done.stdout, done.stderr)


def test_a_program_is_started_where_python_reads_a_variable_at_the_start(commands: Commands, tmp_path: Path) -> None:
    """Here the path of modules, with a plugin that fails."""
    (tmp_path / "broken.py").write_text("raise ZeroDivisionError")
    information = tmp_path / "broken-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[modelexpress.plugins]\nbroken = broken\n")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}

    done = commands.run(["plugins"], environ, timeout=60)

    assert not commands.can_run(environ)
    assert "ZeroDivisionError" in done.stdout + done.stderr


def test_what_a_killed_copy_returns(server_commands: Commands) -> None:
    """The signal, and what it had said by then."""
    here = ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    running = server_commands.start(["serve", *here], dict(os.environ))
    said = running.stderr.readline()
    before = running.poll()
    running.kill()

    assert said.startswith("serving on ")
    assert before is None
    assert -signal.SIGKILL == running.wait(60)
    assert "" == running.communicate()[0]


def test_copies_end_with_the_process_that_they_are_of() -> None:
    """However long they would run."""
    here = ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    with closing(Commands()) as commands:
        running = commands.start(["serve", *here], dict(os.environ))
        assert running.stderr.readline().startswith("serving on ")

    with running.stdout, running.stderr:  # both end with their process
        running.stdout.read()
        running.stderr.read()
    with pytest.raises(RuntimeError, match="has ended"):
        running.wait(10)
