"""Stores in a namespace of their own, on a real API server."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from devtools.kube_apiserver import KubeApiServer
from mx_kubernetes._client import Kubernetes
from mx_kubernetes._store import KubernetesStore


def install_crds(server: KubeApiServer) -> None:
    server.apply(files("mx_kubernetes").joinpath("crds.yaml").read_text("utf-8"))


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None) -> None:
    pass


@pytest.fixture(scope="session")
def api_server(kube_apiserver: KubeApiServer) -> KubeApiServer:
    """With our custom resources."""
    install_crds(kube_apiserver)
    return kube_apiserver


@pytest.fixture
def namespace(api_server: KubeApiServer) -> str:
    """A new one."""
    return api_server.new_namespace()


@pytest.fixture
def new_store(api_server: KubeApiServer, namespace: str, tmp_path: Path) -> Callable[..., KubernetesStore]:
    """Makes stores in the namespace of the test; called within an event loop."""

    def new_store(**options: Any) -> KubernetesStore:
        path = api_server.kubeconfig(tmp_path / "kubeconfig", namespace)
        return KubernetesStore(Kubernetes({"KUBECONFIG": str(path)}), **options)

    return new_store
