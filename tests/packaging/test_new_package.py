"""Each tool of this repository finds a package by its folder: a copy of the tree gets one more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devtools.packages import ROOT, discover

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("new package")]

_PYPROJECT = """
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "mx-foo"
version = "0.1.0"
dependencies = ["modelexpress-core==0.1.0"]

[project.entry-points."modelexpress.plugins"]
mx-foo = "mx_foo.plugin"

[tool.hatch.build.targets.wheel]
packages = ["src/mx_foo"]
"""

_PLUGIN = '''"""Hooks of mx-foo."""

from __future__ import annotations

from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageProvider


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    """Register no storage yet."""
    return []
'''

_TEST = """from mx_foo import plugin


def test_it_registers_nothing_yet() -> None:
    assert [] == plugin.mx_register_storages()
"""

#: Statement in mx_foo -> the module of core that it imports and may not.
_FORBIDDEN = {
    "import modelexpress_core": "modelexpress_core",
    "from modelexpress_core.fetch.engine import FetchEngine": "modelexpress_core.fetch.engine",
    "from modelexpress_core.storage.file import FileStorage": "modelexpress_core.storage.file",
    "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from modelexpress_core.loader import Loader": (
        "modelexpress_core.loader"
    ),
}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository with one more folder, ``plugins/mx-foo``."""
    tree = tmp_path_factory.mktemp("copy") / "repository"
    # Of caches only mypy's is worth its copy: it saves most of a run where `make lint` came before.
    ignored = shutil.ignore_patterns(
        ".git", ".[!m]*_cache", ".venv*", ".hypothesis", "__pycache__", "*.egg-info", "results"
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    foo = tree / "plugins" / "mx-foo"
    files = {
        "pyproject.toml": _PYPROJECT,
        "src/mx_foo/__init__.py": '"""A plugin of a test."""\n',
        "src/mx_foo/plugin.py": _PLUGIN,
        "src/mx_foo/py.typed": "",
        "tests/test_foo.py": _TEST,
    }
    for name, content in files.items():
        (foo / name).parent.mkdir(parents=True, exist_ok=True)
        (foo / name).write_text(content)
    return tree


@pytest.fixture
def run(tree: Path) -> Run:
    """Runs a program in the copy, whose modules go before those that are installed."""
    sources = [tree, *(package.source for package in discover(tree))]

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MAKE"))}
        environ |= {"PYTHONPATH": os.pathsep.join(map(str, sources)), "COLUMNS": "200"}
        return subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True, timeout=500, check=False)

    return run


@pytest.fixture
def mistake(tree: Path) -> Iterator[Callable[[str], None]]:
    """Writes a module ``mx_foo._mistake``; it is gone after the test."""
    path = tree / "plugins" / "mx-foo" / "src" / "mx_foo" / "_mistake.py"

    def mistake(code: str) -> None:
        path.write_text(f'"""A mistake."""\n\n{code}\n')

    yield mistake
    path.unlink(missing_ok=True)


def test_make_installs_it(run: Run) -> None:
    """The environment of developers gets it as an editable install."""
    done = run("make", "--dry-run", "VENV=new", "new/.installed")

    assert done.returncode == 0, done.stderr
    assert "--editable plugins/mx-foo " in done.stdout


def test_pytest_collects_its_tests(run: Run) -> None:
    """Without an argument, as ``make test`` does; the folder is among the paths of ``make test-fast``, too."""
    done = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-k", "registers_nothing_yet")
    fast = run("make", "--dry-run", "VENV=new", "test-fast")

    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert " plugins/mx-foo/tests" in fast.stdout, fast.stderr


def test_import_linter_accepts_what_core_offers(run: Run) -> None:
    """The new package has a rule of the same kind as the others."""
    done = run(sys.executable, "-m", "devtools.package_imports")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "mx-foo imports only what core offers KEPT" in done.stdout


@pytest.mark.parametrize("code", _FORBIDDEN, ids=_FORBIDDEN.__getitem__)
def test_import_linter_refuses_all_else(run: Run, mistake: Callable[[str], None], code: str) -> None:
    """The facade, the engine, a single module of an offered package, and an import for types alone."""
    mistake(code)

    done = run(sys.executable, "-m", "devtools.package_imports")

    assert done.returncode == 1, done.stdout + done.stderr
    assert f"mx_foo._mistake is not allowed to import {_FORBIDDEN[code]}:" in done.stdout


def test_only_a_transport_may_use_what_is_offered_to_transports(
    run: Run, tree: Path, mistake: Callable[[str], None]
) -> None:
    """Leases and calls to workers are not for storages; one that registers a transport may use them."""
    mistake("from modelexpress_core.sources.worker_client import WorkerClient\n\n__all__ = ['WorkerClient']")
    plugin = tree / "plugins" / "mx-foo" / "src" / "mx_foo" / "plugin.py"

    storage = run(sys.executable, "-m", "devtools.package_imports")
    plugin.write_text(_PLUGIN.replace("mx_register_storages", "mx_register_transports"))
    transport = run(sys.executable, "-m", "devtools.package_imports")

    plugin.write_text(_PLUGIN)
    assert (1, 0) == (storage.returncode, transport.returncode), storage.stdout + transport.stdout
    assert "mx_foo._mistake is not allowed to import modelexpress_core.sources.worker_client:" in storage.stdout


def test_import_linter_refuses_an_import_by_core(run: Run, tree: Path) -> None:
    """Core imports no package, the new one included."""
    path = tree / "modelexpress_core" / "_mistake.py"
    path.write_text("import mx_foo.plugin\n")

    done = run(sys.executable, "-m", "devtools.package_imports")

    path.unlink()
    assert done.returncode == 1
    assert "modelexpress_core._mistake -> mx_foo.plugin" in done.stdout


@pytest.mark.timeout(600)
def test_mypy_and_ruff_check_it(run: Run, mistake: Callable[[str], None]) -> None:
    """A wrong type, and an import that is sorted among those of other people."""
    mistake("import attrs\nfrom mx_foo import plugin\n\nSIZE: int = plugin.mx_register_storages()\nLIST = attrs")

    types = run(sys.executable, "-m", "mypy")
    style = run(sys.executable, "-m", "ruff", "check", "--no-cache")

    assert "plugins/mx-foo/src/mx_foo/_mistake.py:6: error: Incompatible types in assignment" in types.stdout
    assert "I001" in style.stdout
    assert "plugins/mx-foo/src/mx_foo/_mistake.py" in style.stdout


def test_a_list_that_offers_what_does_not_exist_is_refused(run: Run, tree: Path) -> None:
    """A module that moved must not leave its name behind."""
    path = tree / "pyproject.toml"
    text = path.read_text()
    path.write_text(text.replace('"modelexpress_core.uri",', '"modelexpress_core.url",'))

    done = run(sys.executable, "-m", "devtools.package_imports")

    path.write_text(text)
    assert done.returncode == 1
    assert "offers a module that does not exist: modelexpress_core.url" in done.stderr
