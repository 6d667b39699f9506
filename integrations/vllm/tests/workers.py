"""Engines of real vLLM in processes of their own, and the server that lists them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelexpress_core.uri import ModelURI
from tests.support.waiting import eventually

__all__ = ["NIXL", "NO_NIXL", "Engine", "Server", "Start", "install_unpacked_plugin", "scheme"]

#: Variables of an engine that offers its weights over NIXL too, and of one that reads over gRPC alone.
NIXL = {"MX_NIXL_OFFER": "1", "NIXL_LOG_LEVEL": "WARN"}
NO_NIXL = {"MX_DISABLED_PLUGINS": "mx-nixl"}

_SECONDS = 600

_UNPACKED = Path(__file__).with_name("unpacked_plugin.py")


def install_unpacked_plugin(directory: Path) -> None:
    """Make ``unpacked_plugin`` importable from ``directory``, under the name ``unpacked`` in ``VLLM_PLUGINS``."""
    shutil.copy(_UNPACKED, directory)
    information = directory / "unpacked_plugin-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: unpacked-plugin\nVersion: 1.0\n")
    entry_point = "[vllm.general_plugins]\nunpacked = unpacked_plugin:keep_parameters_and_experts\n"
    (information / "entry_points.txt").write_text(entry_point)


def scheme(uri: str) -> str:
    """Return the scheme of a place that an engine loaded from."""
    return ModelURI.parse(uri).scheme


class Server:
    """``mx serve`` on free ports of loopback, until the end of the ``with`` block.

    Args:
        *arguments: More options.
        **environ: More variables.
    """

    def __init__(self, *arguments: str, **environ: str) -> None:
        here = ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "modelexpress_core", "serve", *here, *arguments],
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        match = next(filter(None, (re.match(r"serving on ([^\s,]+)", line) for line in self._process.stdout)))
        self.url = match[1]
        self._reading = threading.Thread(target=self._process.stdout.read, daemon=True)
        self._reading.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reading.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def process_id(self) -> int:
        """Its process."""
        return self._process.pid

    def sources(self) -> list[dict[str, Any]]:
        """Return what ``mx sources`` lists."""
        done = subprocess.run(
            [sys.executable, "-m", "modelexpress_core", "sources", "--json"],
            env={**os.environ, "MODEL_EXPRESS_URL": self.url},
            capture_output=True,
            text=True,
            check=True,
            timeout=_SECONDS,
        )
        found = json.loads(done.stdout)
        return list(found)

    def wait_for(self, workers: int, status: str = "ready") -> list[dict[str, Any]]:
        """Wait until as many workers have a status, and return all that are listed."""

        def listed() -> list[dict[str, Any]] | None:
            found = self.sources()
            return found if workers == sum(each["status"].lower() == status for each in found) else None

        found = eventually(listed, seconds=_SECONDS)
        assert found is not None
        return found


class Engine:
    """A process of ``worker.py``, ended at the end of the ``with`` block.

    Args:
        options: Options of the engine.
        environ: More variables.
        packed: Whether vLLM packs weights, as its build for CPUs does; else they stay in their parameters.

    Attributes:
        process: The process.
        ready: Its first answer; waits until there is one.
    """

    def __init__(self, options: Mapping[str, Any], environ: Mapping[str, str], *, packed: bool = False) -> None:
        self._plugin = tempfile.TemporaryDirectory()
        install_unpacked_plugin(Path(self._plugin.name))
        paths = [self._plugin.name, environ.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), json.dumps(dict(options))],
            env={
                **os.environ,
                "VLLM_PLUGINS": "modelexpress" if packed else "modelexpress,unpacked",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if "distributed_executor_backend" in options else "0",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
                "MX_WORKER_HOST": "127.0.0.1",
                "MX_WORKER_GRPC_PORT": "0",
                "MX_BULK_PORT": "0",
                **environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._answers: list[Any] = []
        self._asked = 0
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._reading.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self._plugin.cleanup()

    def kill(self) -> None:
        """End it and its workers at once, without a word."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                self._answers.append(json.loads(line.removeprefix("ANSWER ")))
            else:
                self._lines.append(line)

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return "".join(self._lines)

    @property
    def ready(self) -> Any:
        return self._answer(0)

    def do(self, *step: Any) -> Any:
        """Let it do a step, and return the answer."""
        assert self.ready == "ready", self.ready
        assert self.process.stdin is not None
        self._asked += 1
        self.process.stdin.write(json.dumps(step) + "\n")
        self.process.stdin.flush()
        return self._answer(self._asked)

    def _answer(self, number: int) -> Any:
        eventually(
            lambda: len(self._answers) > number or (self.process.poll() is not None and not self._reading.is_alive()),
            seconds=_SECONDS,
        )
        assert len(self._answers) > number, self.log[-6000:]
        return self._answers[number]

    def loaded_from(self) -> Sequence[str]:
        """Return where its loads read from, in order."""
        return re.findall(r"ModelExpress loaded (\S+):", self.log)


#: Starts an engine: ``start(model, uri, environ, packed=False, **options)``.
Start = Callable[..., Engine]
