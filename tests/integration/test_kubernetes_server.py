"""Servers of a namespace of Kubernetes: metadata in its custom resources, callers with service accounts."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from devtools.kube_apiserver import KubeApiServer
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.errors import AccessDeniedError
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.identity import own_identity
from modelexpress_core.sources.offering import Offer
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
    """What one caller publishes at one server, another finds at the other; records stay if a server is killed.

    A worker that knows its pod belongs to it.
    """
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
    uid = "0a1b2c3d-0000-4000-8000-0123456789ab"
    weights = {"w": torch.ones(3)}
    environ = {
        "MODEL_EXPRESS_URL": other.url,
        "MX_WORKER_GRPC_PORT": "0",
        "MX_AUTH_TOKEN_PATH": str(tmp_path / "vllm-modelexpress"),
        "POD_NAME": "worker-0",
        "POD_UID": uid,
        "POD_NAMESPACE": namespace,
    }
    identity = own_identity("acme/other", weights)
    with calling(other, "vllm") as client:
        with Offer(identity, weights, transports=["grpc"], environ=environ) as offer:
            assert eventually(lambda: client.metadata(identity.source_id, offer.worker_id).found)
        path = f"/apis/modelexpress.io/v1alpha1/namespaces/{namespace}/modelsources"
        [owned] = [
            each for each in kube_apiserver.request("GET", path)["items"] if each["spec"]["modelName"] == "acme/other"
        ]
        reference = {"apiVersion": "v1", "kind": "Pod", "name": "worker-0", "uid": uid}
        assert [reference] == owned["metadata"]["ownerReferences"]
        assert owned["status"]["ready"] is False, "it was withdrawn"
    for wrong, status in ((("stranger",), "PERMISSION_DENIED"), (("vllm", "other"), "UNAUTHENTICATED")):
        with calling(other, *wrong) as client, pytest.raises(AccessDeniedError, match=status):
            client.list_sources()
