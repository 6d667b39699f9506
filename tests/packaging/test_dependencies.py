"""What the packages require of others: bounds with reasons, one lock file, and every Python that is supported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from devtools.packages import ROOT, discover, pyproject

_FOLDERS = [ROOT, *(package.directory for package in discover())]
_PROJECT = pyproject(ROOT)["project"]

#: Extras that only name others, and the one whose versions the lock file alone sets.
_COLLECTIONS = {"all", "dev"}

#: Packages that need no upper bound: the reason is on the line.
_UNBOUNDED = {"attrs", "certifi"}


def lines(folder: Path) -> dict[str, str]:
    """Return the line of ``pyproject.toml`` that each requirement of users is on."""
    content: dict[str, Any] = pyproject(folder)
    project = content["project"]
    extras = {name: each for name, each in project.get("optional-dependencies", {}).items() if name not in _COLLECTIONS}
    required = [*content["build-system"]["requires"], *project.get("dependencies", []), *chain(*extras.values())]
    text = (folder / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    return {each: next(line for line in text if f'"{each}"' in line) for each in required if "==" not in each}


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: folder.name)
def test_every_bound_has_its_reason_on_the_line(folder: Path) -> None:
    """And each requirement of users excludes the next major version, unless the reason says why not."""
    found = lines(folder)
    names = {each: re.split(r"[<>=~!\[; ]", each)[0] for each in found}

    assert found
    assert [] == [line for line in found.values() if "#" not in line]
    assert [] == [each for each, name in names.items() if "<" not in each and name not in _UNBOUNDED]


def test_the_supported_pythons_are_the_same_everywhere() -> None:
    """In the classifiers, in what ``make check-lock`` resolves, and in the README."""
    minors = re.findall(r"Python :: (3\.\d+)", "\n".join(_PROJECT["classifiers"]))
    checked = re.search(r"^PYTHONS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert checked is not None
    assert minors == checked[1].split()
    assert f">={minors[0]}" == _PROJECT["requires-python"]
    assert f"Python {minors[0]} to {minors[-1]} on Linux" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("configured", [{}, {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple"}], ids=["pypi", "mirror"])
def test_the_lock_file_fits_the_packages(configured: dict[str, str]) -> None:
    """Whichever index this machine uses. uv needs no network: the lock file has all that it compares."""
    uv = Path(sys.executable).with_name("uv")
    (index,) = set(re.findall(r'^source = \{ registry = "(.*)" \}', (ROOT / "uv.lock").read_text(), re.MULTILINE))
    done = subprocess.run(
        [uv, "lock", "--check", "--offline", "--default-index", index],
        cwd=ROOT,
        env={**os.environ, **configured},
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == done.returncode, f"run `make lock`\n{done.stderr}"


def test_the_lock_file_names_no_mirror() -> None:
    """The index that it names is the one that pip and uv use where nothing is configured, over TLS."""
    urls = re.findall(r"\w+://[^/\"]+", (ROOT / "uv.lock").read_text())
    from pip._internal.models.index import PyPI

    assert {PyPI.url.rstrip("/"), f"https://{PyPI.file_storage_domain}"} == set(urls)


def test_one_version_of_torch_is_tested() -> None:
    """The lock file has the one that pip installs for tests."""
    (pinned,) = re.findall(r"^torch==\S+", (ROOT / "constraints-dev.txt").read_text(), re.MULTILINE)

    assert [pinned] == pyproject(ROOT)["tool"]["uv"]["constraint-dependencies"]
    assert f'name = "torch"\nversion = "{pinned.partition("==")[2]}"\n' in (ROOT / "uv.lock").read_text()
