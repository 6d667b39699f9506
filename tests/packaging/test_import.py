"""Importing the package is cheap and drags nothing along."""

from __future__ import annotations

import importlib.metadata
import resource
import subprocess
import sys

import pytest

from devtools.packages import discover
from modelexpress_core.plugins import CORE, ENTRY_POINT_GROUP

_HEAVY = {"torch", "grpc", "boto3", "botocore", "nixl", "numpy", "google", "azure", "huggingface_hub", "vllm", "typer"}

#: The modules of our own plugins.
_OURS = {CORE, *(package.distribution for package in discover())}
_PLUGINS = sorted(
    point.value for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP) if point.name in _OURS
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module", ["modelexpress_core", "modelexpress_core.hooks", "modelexpress_core.hookspecs", *_PLUGINS]
)
def test_nothing_heavy_comes_with_an_import(module: str) -> None:
    """Neither torch nor an SDK: listing plugins must not cost seconds, nor fail over a broken SDK."""
    # What site-packages' .pth files and namespace packages bring is there before anything is imported.
    code = f"import sys; before = set(sys.modules); import {module}; print(*(set(sys.modules) - before))"

    imported = {name.partition(".")[0] for name in run(code).split()}

    assert module.partition(".")[0] in imported
    assert set() == imported & _HEAVY


def test_discovery_imports_nothing_heavy_either() -> None:
    """Finding and registering all first-party plugins, and looking a scheme up, brings no SDK."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "from modelexpress_core.plugins import STORAGE, PluginManager\n"
        f"names = {','.join(value.partition('.')[0].replace('_', '-') for value in _PLUGINS)!r}\n"
        "manager = PluginManager.discover({'MX_PLUGINS': names})\n"
        "assert manager.table(STORAGE).lookup('file')\n"
        "print(*(set(sys.modules) - before))"
    )

    assert set() == {name.partition(".")[0] for name in run(code).split()} & _HEAVY


def best_seconds(code: str) -> float:
    """CPU time of a fresh interpreter, the best of seven; wall time would grow with the tests that run beside."""
    times = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_the_import_takes_less_than_150_ms() -> None:
    """Over a bare interpreter."""
    run("import modelexpress_core")  # byte code is written once

    extra = best_seconds("import modelexpress_core") - best_seconds("pass")

    assert extra < 0.150, f"{extra * 1000:.0f} ms"
