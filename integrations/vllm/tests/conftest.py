"""Fixtures that run real vLLM in separate processes, on generated checkpoints."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from devtools.fake_hub import FakeHub
from devtools.seaweedfs import SeaweedFS
from integrations.vllm.tests.workers import Engine, Server, Start
from tests.support.waiting import eventually

_MODELS = Path(__file__).with_name("models.py")
_SECONDS = 1700

#: `make test-vllm` runs these, in an environment that has vLLM.
_WITH_VLLM = [
    "test_failures.py",
    "test_peer_failures.py",
    "test_peer_models.py",
    "test_peers.py",
    "test_register.py",
    "test_reload.py",
    "test_serve.py",
    "test_tokens.py",
]

collect_ignore = [] if importlib.util.find_spec("vllm") else _WITH_VLLM


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of all processes that run these tests side by side."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own


@pytest.fixture(scope="session")
def vllm_cache(shared: Path) -> Path:
    """Where vLLM keeps what it found out about its classes of models: to find it out takes ten seconds for each."""
    return shared / "vllm-cache"


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None, vllm_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(vllm_cache))


@pytest.fixture(scope="session")
def checkpoint(shared: Path) -> Callable[[str], Path]:
    """A function that returns the directory with a checkpoint of ``models.py``. One process writes them all."""
    directory, done = shared / "models", shared / "models.done"
    try:
        directory.mkdir()
    except FileExistsError:
        eventually(done.exists, seconds=_SECONDS)
    else:
        try:
            subprocess.run([sys.executable, str(_MODELS), str(directory)], check=True, timeout=_SECONDS)
        finally:
            done.touch()
    return lambda name: directory / name


@pytest.fixture
def run_vllm() -> Callable[..., tuple[Any, str]]:
    """A function that runs a program of this directory; returns the results that it prints as JSON, and its output."""

    def run_vllm(program: str, argument: object, **environ: str) -> tuple[Any, str]:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(program)), json.dumps(argument)],
            env={
                **os.environ,
                "VLLM_PLUGINS": "modelexpress",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
                **environ,
            },
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed[-6000:]
        return json.loads(done.stdout.splitlines()[-1]), printed

    return run_vllm


@pytest.fixture
def generated(run_vllm: Callable[..., tuple[Any, str]]) -> Callable[..., tuple[list[dict[str, Any]], str]]:
    """A function that runs vLLM several times in one process; returns the results and the output."""

    def generated(runs: Sequence[dict[str, Any]], **environ: str) -> tuple[list[dict[str, Any]], str]:
        in_one_process = all(run.get("tensor_parallel", 1) == 1 for run in runs)
        processes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_one_process else "1"}
        results, printed = run_vllm("generate.py", list(runs), **{**processes, **environ})
        return results, printed

    return generated


@pytest.fixture(scope="session")
def faulty_plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The PYTHONPATH with which a plugin is installed that makes loads fail."""
    directory = tmp_path_factory.mktemp("faulty-plugin")
    shutil.copy(Path(__file__).with_name("faulty_plugin.py"), directory)
    information = directory / "faulty_plugin-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-plugin\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[modelexpress.plugins]\nfaulty-plugin = faulty_plugin\n")
    return os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def start(server: Server, s3_server: SeaweedFS) -> Iterator[Start]:
    """A function that starts an engine whose MX_MODEL_URI is in the object store; all end with the test."""
    with ExitStack() as engines:

        def start(
            model: Path, uri: str, environ: Mapping[str, str] | None = None, *, packed: bool = False, **options: Any
        ) -> Engine:
            variables = {
                "MODEL_EXPRESS_URL": server.url,
                **({"MX_MODEL_URI": uri} if uri else {}),
                **s3_server.environ(),
                **(environ or {}),
            }
            given = {"model": str(model), "load_format": "mx", **options}
            return engines.enter_context(Engine(given, variables, packed=packed))

        yield start


@pytest.fixture
def changed(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """The checkpoint with other values in some tensors."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(checkpoint("llama"), tmp_path / "changed")
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: -each if "o_proj" in name else each for name, each in tensors.items()}, file, {"format": "pt"})
    return copy


@pytest.fixture(scope="session")
def caching(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    """A server that caches models of a Hub, which has some of the checkpoints; and the directory of its cache."""
    directory = tmp_path_factory.mktemp("cache")
    with FakeHub() as hub:
        for name in ("llama", "qwen3", "mixtral"):
            hub.upload(checkpoint(name), f"org/{name}")
        environ = {**hub.environ(), "MX_CACHE_SOURCES": "hf", "MX_CACHE_MIN_FREE_BYTES": "1"}
        with Server("--cache-dir", str(directory), **environ) as server:
            yield server, directory
