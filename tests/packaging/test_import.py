"""Importing the package is cheap and drags nothing along."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time

import pytest

from modelexpress_core.plugins import CORE, ENTRY_POINT_GROUP

_HEAVY = {"torch", "grpc", "boto3", "botocore", "nixl", "numpy", "google", "azure", "huggingface_hub", "vllm", "typer"}

#: Ours; other people's plugins are not what is tested.
_PLUGINS = sorted(
    point.value
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    if point.name == CORE or point.name in {"mx-s3", "mx-gcs", "mx-azure", "mx-hf", "mx-nixl", "mx-grpc-stream"}
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
    """Wall time of a fresh interpreter, the best of seven, since noise only adds."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_the_import_takes_less_than_150_ms() -> None:
    """Over a bare interpreter."""
    run("import modelexpress_core")  # byte code is written once

    extra = best_seconds("import modelexpress_core") - best_seconds("pass")

    assert extra < 0.150, f"{extra * 1000:.0f} ms"
