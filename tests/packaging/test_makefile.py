"""The Makefile says what is wrong where it cannot do what is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from devtools.packages import ROOT


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The variables of a make that runs these tests reach them by both ways.
    of_make = ("MAKE", "MFLAGS", "PYTHON", "VENV")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(of_make)}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=60
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment of Python 3.9.1 that is complete, and in which every program succeeds."""
    script(tmp_path / "bin" / "python", 'test "$1" != -V || echo Python 3.9.1')
    (tmp_path / ".installed").touch()
    return tmp_path


def test_another_python_than_that_of_the_environment_is_refused(environment: Path) -> None:
    """It would be ignored, since the environment exists."""
    done = make(f"VENV={environment}", f"PYTHON={sys.executable}", "demo")

    assert 2 == done.returncode
    assert f"{environment} has Python 3.9.1" in done.stderr
    assert f"remove {environment}" in done.stderr
    assert "VENV=.venv-other" in done.stderr


def test_the_same_python_is_not_refused(environment: Path) -> None:
    """Nor is an environment, if no Python is asked for."""
    same = script(environment / "same", "echo Python 3.9.1")

    assert 0 == make(f"VENV={environment}", f"PYTHON={same}", "demo").returncode
    assert 0 == make(f"VENV={environment}", "demo").returncode


def test_a_python_that_is_too_old_is_refused(tmp_path: Path) -> None:
    """Before anything is made."""
    old = script(tmp_path / "old", "exit 1")

    done = make(f"VENV={tmp_path / 'venv'}", f"PYTHON={old}", "demo")

    assert 2 == done.returncode
    assert "Python 3.10 or newer is needed" in done.stderr
    assert not (tmp_path / "venv").exists()
