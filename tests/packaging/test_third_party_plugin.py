"""A plugin that somebody else wrote, built and installed by pip alone, and removed again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path
from typing import Any

import pytest

_PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "mx-shout"
version = "3.2.1"
dependencies = ["modelexpress-core"]

[project.entry-points."modelexpress.plugins"]
mx-shout = "mx_shout.plugin"

[tool.hatch.build.targets.wheel]
packages = ["src/mx_shout"]
"""

_PLUGIN = """
from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageProvider


def open_shout(uri, settings):
    from mx_shout._storage import ShoutStorage

    return ShoutStorage(uri.authority, settings.get("MX_SHOUT_SUFFIX", "!"))


@hookimpl
def mx_register_storages():
    return [StorageProvider("mx-shout", ("shout",), open_shout)]
"""

_STORAGE = '''
from modelexpress_core.errors import NotFoundError, SourceChangedError
from modelexpress_core.contracts.storage import ObjectInfo


class ShoutStorage:
    """Every object holds its own name, in capitals: shout://word/hello is HELLO!"""

    def __init__(self, authority, suffix):
        self._authority = authority
        self._suffix = suffix

    def _content(self, path):
        if path.startswith("silence"):
            raise NotFoundError("nobody shouts it", uri=f"shout://{self._authority}/{path}", operation="read")
        return (path.upper() + self._suffix).encode()

    def list(self, prefix):
        yield self.stat(f"{prefix}/hello")

    def stat(self, path):
        return ObjectInfo(path, len(self._content(path)), version="1")

    def read_into(self, path, offset, buffer, *, version):
        if version not in (None, "1"):
            raise SourceChangedError("another version", uri=f"shout://{self._authority}/{path}", operation="read")
        part = self._content(path)[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def close(self):
        pass
'''

#: What the plugin is asked, in a process that knows nothing but what is installed.
_PROBE = """
import json, sys
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.plugins import PluginManager, STORAGE
from modelexpress_core.uri import ModelURI

manager = PluginManager.discover({"MX_PLUGINS": "mx-shout", "MX_STRICT_PLUGINS": "1"})
told = {plugin.name: [plugin.version, plugin.status, plugin.schemes] for plugin in manager.plugins}
answer = {"plugin": told.get("mx-shout"), "early": "mx_shout._storage" in sys.modules}
try:
    registered, storage = manager.open(STORAGE, ModelURI.parse("shout://word/models"), {"MX_SHOUT_SUFFIX": "?"})
    info, = storage.list("models")
    buffer = bytearray(info.size)
    read = storage.read_into(info.path, 0, memoryview(buffer), version=info.version)
    answer |= {"from": registered.label, "read": read, "content": buffer.decode()}
except ModelExpressError as exc:
    answer["error"] = str(exc)
print(json.dumps(answer))
"""


def run(*command: str | Path, cwd: Path) -> str:
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_CONFIG_FILE": os.devnull}
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MX_", "PIP_", "PYTHON"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environ | quiet, capture_output=True, text=True, check=False
    )
    assert 0 == done.returncode, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The third party's wheel, built from source without the network."""
    source = tmp_path_factory.mktemp("mx-shout")
    package = source / "src" / "mx_shout"
    package.mkdir(parents=True)
    (source / "pyproject.toml").write_text(_PYPROJECT)
    (package / "__init__.py").touch()
    (package / "plugin.py").write_text(_PLUGIN)
    (package / "_storage.py").write_text(_STORAGE)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--quiet")

    run(*pip, "--wheel-dir", source / "dist", source, cwd=source)

    (built,) = (source / "dist").glob("*.whl")
    return built


class Environment:
    """A fresh virtual environment that also sees what is installed where the tests run."""

    def __init__(self, root: Path) -> None:
        self._root = root
        venv.create(root, with_pip=False, symlinks=True)
        self.python = root / "bin" / "python"
        (here,) = (root / "lib").glob("python*/site-packages")
        seen = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        lines = [f"import site; site.addsitedir({directory!r})\n" for directory in seen]  # editable installs too
        (here / "outer.pth").write_text("".join(lines))

    def pip(self, *arguments: str | Path) -> str:
        return run(sys.executable, "-m", "pip", "--python", self.python, *arguments, cwd=self._root)

    def probe(self) -> dict[str, Any]:
        return json.loads(run(self.python, "-c", _PROBE, cwd=self._root))


def test_pip_install_alone_makes_a_plugin_usable_and_uninstall_removes_it(wheel: Path, tmp_path: Path) -> None:
    """No registration, no configuration: installed, it is found and read from; uninstalled, it is gone."""
    environment = Environment(tmp_path / "venv")
    before = environment.probe()

    environment.pip("install", "--no-deps", "--no-index", "--quiet", wheel)
    installed = environment.probe()
    environment.pip("uninstall", "--yes", "--quiet", "mx-shout")
    after = environment.probe()

    expected = {
        "plugin": ["3.2.1", "loaded", {"storage": ["shout"]}],
        "early": False,
        "from": "mx-shout",
        "read": 13,
        "content": "MODELS/HELLO?",
    }
    assert expected == installed
    assert before["plugin"] is None
    assert "shout" in before["error"]
    assert before == after


def test_a_useful_storage_is_about_fifty_lines() -> None:
    """The whole plugin, without its packaging, as a measure of what the contract asks of an author."""
    lines = [line for line in textwrap.dedent(_PLUGIN + _STORAGE).splitlines() if line.strip()]

    assert len(lines) <= 50
