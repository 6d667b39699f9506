"""A real kube-apiserver with its etcd on loopback, for tests and benchmarks. No scheduler, no controllers, no nodes.

Both programs are in the folder that ``KUBEBUILDER_ASSETS`` names, as for other projects that test against an API
server.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from devtools.missing import ToolMissingError
from devtools.processes import start_patiently, started

__all__ = ["KubeApiError", "KubeApiServer", "KubeApiServerError", "binaries"]

_READY_SECONDS = 120.0
_ADMIN = "admin"

_AUDIT_POLICY = """
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
"""


class KubeApiServerError(RuntimeError):
    """The API server did not start."""


class KubeApiError(RuntimeError):
    """The API server refused a request.

    Args:
        status: The HTTP status.
        text: The body of the answer.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:500]}")
        self.status = status


def binaries() -> tuple[Path, Path]:
    """Return the paths of kube-apiserver and etcd.

    Raises:
        ToolMissingError: One is missing.
    """
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    hint = "set KUBEBUILDER_ASSETS to a folder that holds kube-apiserver and etcd"
    if not folder:
        message = f"kube-apiserver: {hint}"
        raise ToolMissingError(message)
    found = Path(folder, "kube-apiserver"), Path(folder, "etcd")
    for program in found:
        if shutil.which(program) is None:
            message = f"{program.name}: {hint}"
            raise ToolMissingError(message)
    return found


class KubeApiServer:
    """Runs during the ``with`` block, on one port, with RBAC and an administrator.

    Attributes:
        url: Its address.
        authority: File with the certificate authority of its address.
        tls: Trusts that authority.
        token: Bearer token of the administrator.
    """

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kube-apiserver-")
        self._path = Path(self._directory.name)
        self._etcd: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.token = secrets.token_hex(16)
        self.authority = self._path / "ca.pem"
        self.url = ""

    def __enter__(self) -> KubeApiServer:
        try:
            self._program, self._etcd_program = binaries()
            self._write_files()
            start_patiently(self._start_both, self._kill_both, KubeApiServerError)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_both()
        self._directory.cleanup()

    def _write_files(self) -> None:
        # conftest.py imports this module also in environments that lack them.
        import trustme
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.authority))
        certificate = authority.issue_cert("127.0.0.1", "localhost")
        certificate.private_key_pem.write_to_path(str(self._path / "tls.key"))
        for number, blob in enumerate(certificate.cert_chain_pems):
            blob.write_to_path(str(self._path / "tls.crt"), append=number > 0)
        self.tls = ssl.create_default_context(cafile=str(self.authority))
        key = rsa.generate_private_key(65537, 2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        (self._path / "sa.key").write_bytes(pem)
        (self._path / "tokens.csv").write_text(f"{self.token},{_ADMIN},{_ADMIN},system:masters\n")
        (self._path / "audit.yaml").write_text(_AUDIT_POLICY)

    # -- processes -----------------------------------------------------------------------------------------------------

    def _start_both(self) -> None:
        self._port, client, peer = _free_ports(3)
        self.url = f"https://127.0.0.1:{self._port}"
        self._etcd_url = f"http://127.0.0.1:{client}"
        data = self._path / "etcd"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        peers = f"http://127.0.0.1:{peer}"
        urls = (
            "--listen-client-urls",
            "--advertise-client-urls",
            "--listen-peer-urls",
            "--initial-advertise-peer-urls",
        )
        values = (self._etcd_url, self._etcd_url, peers, peers)
        options = [part for pair in zip(urls, values, strict=True) for part in pair]
        self._etcd = started(
            [
                str(self._etcd_program),
                *("--data-dir", "data", "--initial-cluster", f"default={peers}", "--unsafe-no-fsync"),
                *options,
            ],
            data,
        )
        self.start()

    def start(self) -> None:
        """Start the API server, on the same port and the same etcd as before."""
        folder = self._path
        self._process = started(
            [
                str(self._program),
                f"--etcd-servers={self._etcd_url}",
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                f"--secure-port={self._port}",
                f"--tls-cert-file={folder / 'tls.crt'}",
                f"--tls-private-key-file={folder / 'tls.key'}",
                f"--cert-dir={folder}",
                "--service-cluster-ip-range=10.0.0.0/24",
                f"--service-account-key-file={folder / 'sa.key'}",
                f"--service-account-signing-key-file={folder / 'sa.key'}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--token-auth-file={folder / 'tokens.csv'}",
                "--authorization-mode=RBAC",
                "--disable-admission-plugins=ServiceAccount",  # there is no controller that makes default accounts
                f"--audit-policy-file={folder / 'audit.yaml'}",
                f"--audit-log-path={folder / 'audit.log'}",
            ],
            folder,
        )
        deadline = time.monotonic() + _READY_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() >= deadline:
                log = (folder / "log").read_text(errors="replace")[-2000:]
                message = f"kube-apiserver is not ready on {self.url}; status: {self._process.poll()}\n{log}"
                raise KubeApiServerError(message)
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            # After a restart, roles of the bootstrap policy are there only with the namespaces that they are for.
            self.request("GET", "/readyz")
            self.request("GET", "/api/v1/namespaces/default")
        except (KubeApiError, OSError):
            return False
        return True

    def kill(self) -> None:
        """Kill the API server with SIGKILL; etcd goes on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _kill_both(self) -> None:
        self.kill()
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait()
            self._etcd = None

    def freeze(self) -> None:
        """Stop the API server with SIGSTOP: connections stay, and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen API server go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    # -- requests ------------------------------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """Send a request as the administrator, or with another ``token``; return the answer.

        Raises:
            KubeApiError: It was refused.
        """
        headers = {"Authorization": f"Bearer {token or self.token}", "Content-Type": content_type}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310 - it is https
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.tls)
        )
        try:
            with opener.open(request, timeout=30) as response:
                text = response.read()
        except urllib.error.HTTPError as exc:
            with exc:
                raise KubeApiError(exc.code, exc.read().decode(errors="replace")) from exc
        except urllib.error.URLError as exc:
            raise OSError(str(exc)) from exc
        return json.loads(text) if text.startswith(b"{") else {}

    def apply(self, manifests: str) -> None:
        """Apply the objects of a YAML text that belong to no namespace, or name theirs; wait until CRDs are served."""
        import yaml

        for manifest in yaml.safe_load_all(manifests):
            path = self._path_of(manifest)
            query = "?fieldManager=tests&force=true"
            self.request("PATCH", path + query, manifest, content_type="application/apply-patch+yaml")
            if manifest["kind"] == "CustomResourceDefinition":
                self._wait_until_served(path)

    def _path_of(self, manifest: Mapping[str, Any]) -> str:
        version, metadata = manifest["apiVersion"], manifest["metadata"]
        plural = f"{manifest['kind'].lower()}s"
        namespace = f"namespaces/{metadata['namespace']}/" if "namespace" in metadata else ""
        return f"/{'apis' if '/' in version else 'api'}/{version}/{namespace}{plural}/{metadata['name']}"

    def _wait_until_served(self, path: str) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            definition = self.request("GET", path)
            status = definition.get("status") or {}
            conditions = {each["type"]: each["status"] for each in status.get("conditions") or ()}
            if conditions.get("Established") == "True":
                return
            if time.monotonic() >= deadline:
                message = f"{path} is not served: {conditions}"
                raise KubeApiServerError(message)
            time.sleep(0.05)

    def new_namespace(self) -> str:
        """Make a namespace that nobody else uses; return its name."""
        name = f"test-{secrets.token_hex(6)}"
        self.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        return name

    def new_account(self, namespace: str, name: str, rules: Sequence[Mapping[str, Any]] = ()) -> None:
        """Make a service account that may do what ``rules`` say, in its namespace."""
        rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
        self.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})
        self.request("POST", f"{rbac}/roles", {"metadata": {"name": name}, "rules": list(rules)})
        binding = {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": name}],
        }
        self.request("POST", f"{rbac}/rolebindings", binding)

    def new_token(self, namespace: str, account: str, audiences: Sequence[str] = (), seconds: int = 3600) -> str:
        """Return a new token of a service account, as the kubelet projects into pods; no audience: the API server's."""
        spec = {"audiences": list(audiences), "expirationSeconds": seconds}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        answer = self.request("POST", path, {"spec": spec})
        return str(answer["status"]["token"])

    def kubeconfig(self, path: Path, namespace: str, token: str | None = None, url: str | None = None) -> Path:
        """Write a kubeconfig for ``namespace`` to ``path``, of the administrator if there is no other ``token``."""
        authority = base64.b64encode(self.authority.read_bytes()).decode()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "test", "cluster": {"server": url or self.url, "certificate-authority-data": authority}},
            ],
            "users": [{"name": "test", "user": {"token": token or self.token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(config))  # JSON is YAML
        return path

    def audited(self, user: str) -> Iterator[Mapping[str, Any]]:
        """Yield the audit events of the requests of ``user``, in the order of their ends."""
        for line in (self._path / "audit.log").read_text().splitlines():
            event = json.loads(line)
            if event["user"].get("username") == user:
                yield event


def _free_ports(number: int) -> list[int]:
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [int(each.getsockname()[1]) for each in listening]
    for each in listening:
        each.close()
    return ports
