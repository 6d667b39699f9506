"""Servers of a namespace of Kubernetes: metadata in its custom resources, callers with service accounts."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from devtools.kube_apiserver import KubeApiServer
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.errors import AccessDeniedError
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.wire.client import Security
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from modelexpress_core.wire.settings import TlsSettings, TokenSettings
from tests.support.serving import Serving
from tests.support.waiting import eventually

pytestmark = [pytest.mark.xdist_group("kubernetes"), pytest.mark.slow]

_IDENTITY = SourceIdentity("acme/model")
_READY = p2p_pb2.SOURCE_STATUS_READY


def test_two_servers_with_service_accounts(
    kube_apiserver: KubeApiServer, start: Callable[..., Serving], tmp_path: Path
) -> None:
    """What one caller publishes at one server, another finds at the other; records stay if a server is killed."""
    kube_apiserver.apply(files("mx_kubernetes").joinpath("crds.yaml").read_text("utf-8"))
    namespace = kube_apiserver.new_namespace()
    for name in ("vllm", "stranger"):
        kube_apiserver.new_account(namespace, name)
    variables = {
        "KUBECONFIG": str(kube_apiserver.kubeconfig(tmp_path / "config", namespace)),
        "MX_METADATA_BACKEND": "kubernetes",
        "MODEL_EXPRESS_SECURITY_MODE": "enforce",
        "MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES": "modelexpress",
        "MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS": f"{namespace}:vllm",
    }

    def calling(server: Serving, account: str, audience: str = "modelexpress") -> ServerClient:
        path = tmp_path / f"{account}-{audience}"
        path.write_text(kube_apiserver.new_token(namespace, account, [audience]))
        path.chmod(0o600)
        return ServerClient(server.url, security=Security(TlsSettings(), TokenSettings(path=str(path))))

    one, other = start(**variables), start(**variables)
    assert "kubernetes://" == one.metadata
    with calling(one, "vllm") as first, calling(other, "vllm") as second:
        first.publish(_IDENTITY, p2p_pb2.WorkerMetadata(status=_READY, worker_rank=3), "w")

        [listed] = eventually(second.list_sources)
        assert (_IDENTITY.source_id, "w", 3) == (listed.mx_source_id, listed.worker_id, listed.worker_rank)
        one.end()
        found = second.metadata(_IDENTITY.source_id, "w")
        assert (True, 3) == (found.found, found.worker.worker_rank)
        assert f"system:serviceaccount:{namespace}:vllm" == found.publisher
    for wrong, status in ((("stranger",), "PERMISSION_DENIED"), (("vllm", "other"), "UNAUTHENTICATED")):
        with calling(other, *wrong) as client, pytest.raises(AccessDeniedError, match=status):
            client.list_sources()
