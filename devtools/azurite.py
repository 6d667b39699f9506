"""A real server of the Blob service on this machine: Azurite, Microsoft's emulator, from npm.

with Azurite() as server:
    uri = server.upload("checkpoint/", "models", "tiny")
    os.environ.update(server.environ())
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devtools.missing import ToolMissingError
from devtools.packages import ROOT
from devtools.processes import start_patiently, started

if TYPE_CHECKING:
    from azure.storage.blob import BlobServiceClient

__all__ = ["Azurite", "AzuriteError", "binary"]

_READY_SECONDS = 60.0


class AzuriteError(RuntimeError):
    """The server did not start."""


def binary() -> str:
    """Return the path of the server's program: of this checkout, else of this machine.

    Raises:
        ToolMissingError: Neither has it.
    """
    installed = ROOT / ".tools" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    found = str(installed) if installed.is_file() else shutil.which("azurite-blob")
    if found is None or shutil.which("node") is None:
        message = "azurite-blob: install Node.js, and run npm install --prefix .tools/azurite azurite@3"
        raise ToolMissingError(message)
    return found


class Azurite:
    """A server with one account, which runs during the ``with`` block.

    Args:
        *containers: Containers that are created at the start. ``public`` is created too; anyone may read and list it.
        certificate: Files of a certificate and its key, to serve https instead of http, and to accept tokens.
        ca_bundle: File with the authority that signed the certificate.

    Attributes:
        account: Name of the account.
        key: Its key, in Base64.
        endpoint: URL of its Blob service.
    """

    account = "mxaccount"

    def __init__(
        self,
        *containers: str,
        certificate: tuple[Path, Path] | None = None,
        ca_bundle: Path | None = None,
    ) -> None:
        self.key = base64.b64encode(os.urandom(32)).decode()
        self.endpoint = ""
        self._containers = containers or ("models",)
        self._certificate = certificate
        self._ca_bundle = ca_bundle
        self._directory = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Azurite:
        start_patiently(self._start_and_wait, self.stop, AzuriteError)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_and_wait(self) -> None:
        self._start()
        self._wait_till_ready()
        self._create_containers()

    def _start(self) -> None:
        program = binary()
        self._directory = Path(tempfile.mkdtemp(prefix="azurite-"))
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = int(listening.getsockname()[1])
        tls = []
        if self._certificate is not None:
            certificate, key = self._certificate
            tls = ["--oauth", "basic", "--cert", str(certificate), "--key", str(key)]
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/{self.account}"
        self._process = started(
            [
                program,
                *("--blobHost", "127.0.0.1", "--blobPort", str(self.port)),
                *("--location", str(self._directory / "data")),
                *("--silent", "--skipApiVersionCheck", "--disableTelemetry"),
                *tls,
            ],
            self._directory,
            {"AZURITE_ACCOUNTS": f"{self.account}:{self.key}"},
        )

    def _wait_till_ready(self) -> None:
        assert self._process is not None
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        tail = "\n".join((self._directory / "log").read_text(errors="replace").splitlines()[-20:])
        message = f"Azurite did not start at {self.endpoint}; the end of its log:\n{tail}"
        raise AzuriteError(message)

    def _create_containers(self) -> None:
        from azure.core.exceptions import AzureError
        from azure.storage.blob import PublicAccess

        try:
            with contextlib.closing(self.client()) as client:
                for container in self._containers:
                    client.create_container(container)
                client.create_container("public", public_access=PublicAccess.CONTAINER)
        except AzureError as exc:  # another program may have taken the port
            message = f"Azurite does not answer at {self.endpoint}: {exc}"
            raise AzuriteError(message) from exc

    def stop(self) -> None:
        """Kill the server, and remove its data."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(self._directory, ignore_errors=True)

    def environ(self) -> dict[str, str]:
        """Return the environment variables for access to this server with the account's key."""
        variables = {
            "AZURE_STORAGE_ACCOUNT_NAME": self.account,
            "AZURE_STORAGE_ACCOUNT_KEY": self.key,
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
        }
        if self._ca_bundle is not None:
            variables["MX_AZURE_CA_BUNDLE"] = str(self._ca_bundle)
        return variables

    def sas(self, container: str = "models", *, permissions: str = "rl", seconds: float = 3600) -> str:
        """Return a SAS token for a container, which is valid for ``seconds`` from now on."""
        from azure.storage.blob import ContainerSasPermissions, generate_container_sas

        now = datetime.now(timezone.utc)
        return generate_container_sas(
            self.account,
            container,
            account_key=self.key,
            permission=ContainerSasPermissions.from_string(permissions),
            start=now - timedelta(hours=2),
            expiry=now + timedelta(seconds=seconds),
        )

    def client(self) -> BlobServiceClient:
        """Return a client of Microsoft's SDK, with the account's key."""
        from azure.storage.blob import BlobServiceClient

        options: dict[str, Any] = {"retry_total": 0}
        if self._ca_bundle is not None:
            options["connection_verify"] = str(self._ca_bundle)
        credential = {"account_name": self.account, "account_key": self.key}
        return BlobServiceClient(self.endpoint, credential=credential, **options)

    def upload(self, directory: str | os.PathLike[str], container: str = "models", prefix: str = "") -> str:
        """Upload every file below ``directory`` to ``container/prefix``; return the URI."""
        root, prefix = Path(directory), prefix.strip("/")
        with contextlib.closing(self.client()) as client:
            for path in _files(root):
                name = f"{prefix}/{path.relative_to(root).as_posix()}".lstrip("/")
                with path.open("rb") as content:
                    client.get_blob_client(container, name).upload_blob(content, overwrite=True)
        return f"az://{container}/{prefix}".rstrip("/")


def _files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_file())
