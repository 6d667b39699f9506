"""What the server may do in a cluster is what it does: the audit log of a real API server against ``rbac.json``."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from devtools.kube_apiserver import KubeApiServer
from modelexpress_core.contracts.authenticator import Call
from modelexpress_core.contracts.metadata_store import (
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
    UnreadableRecordError,
)
from mx_kubernetes.__main__ import main
from mx_kubernetes._client import Kubernetes
from mx_kubernetes._objects import name_of
from mx_kubernetes._reviews import ReviewAuthenticator
from mx_kubernetes._store import KubernetesStore

pytestmark = [pytest.mark.xdist_group("kubernetes"), pytest.mark.slow]

_READY = SourceStatus.READY
_NEEDED = json.loads(files("mx_kubernetes").joinpath("rbac.json").read_text("utf-8"))

Verbs = dict[tuple[str, str], set[str]]


def verbs_of(rules: Iterable[Mapping[str, Any]]) -> Verbs:
    """The verbs of each resource."""
    return {
        (group, resource): set(rule["verbs"])
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def used_verbs(events: Iterable[Mapping[str, Any]]) -> Verbs:
    """The verbs that audit events needed of each resource."""
    used: Verbs = defaultdict(set)
    for event in events:
        where = event["objectRef"]
        verbs = used[where.get("apiGroup", ""), where["resource"]]
        verbs.add(event["verb"])
        if event["verb"] == "patch" and event["responseStatus"]["code"] == 201:
            verbs.add("create")  # server-side apply of an object that is not there
    return dict(used)


def source(worker: str, data: bytes = b"worker") -> StoredSource:
    return StoredSource(SourceRecord("source", worker, "acme/model", status=_READY), b"identity", data)


async def use_everything(store: KubernetesStore, server: KubeApiServer, namespace: str) -> None:
    """Every kind of request that a server makes, in the life of some sources."""
    leases = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
    old = {
        "metadata": {"name": "old", "labels": {"app.kubernetes.io/managed-by": "model-express"}},
        "spec": {"holderIdentity": "gone", "renewTime": "2020-01-01T00:00:00.000000Z"},
    }
    server.request("POST", leases, old)
    for worker in "ab":
        await store.publish(source(worker, secrets.token_bytes(1000)))
    await store.publish(source("a"))
    assert await store.get("source", "a") is not None
    assert await store.get("source", "none") is None
    assert await store.update("source", "a", _READY, 0.5, "")
    assert await store.update("source", "a", SourceStatus.INITIALIZING, None, "")
    assert await store.lead("role", "one", 0.2) is not None
    await asyncio.sleep(0.5)
    assert await store.lead("role", "one", 0.2) is not None
    assert await store.leader("role") is not None
    await store.update("source", "b", _READY, None, "")
    while not store._opened.view.heartbeats:  # type: ignore[union-attr]  # noqa: ASYNC110 - no event says it
        await asyncio.sleep(0.05)
    # Parts that are gone make it look at the source itself.
    await store.publish(source("c", secrets.token_bytes(1000)))
    contents = f"/apis/modelexpress.io/v1alpha1/namespaces/{namespace}/modelsourcecontents"
    for each in server.request("GET", contents)["items"]:
        if each["metadata"]["name"].startswith(name_of("source", "c")):
            server.request("DELETE", f"{contents}/{each['metadata']['name']}")
    with pytest.raises(UnreadableRecordError):
        await store.get("source", "c")
    await asyncio.sleep(0.3)
    while (await store.list(SourceQuery())).records:
        await store.reap(0.2, 0.25)
        await asyncio.sleep(0.1)
    assert ["old"] != [each["metadata"]["name"] for each in server.request("GET", leases)["items"]]


def test_the_verbs_are_those_that_the_store_uses(
    api_server: KubeApiServer, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is missing, and none is more than it needs."""
    monkeypatch.setattr("mx_kubernetes._store._SWEEP_SECONDS", 0.0)
    monkeypatch.setattr("mx_kubernetes._store._ORPHAN_SECONDS", -60.0)
    api_server.new_account(namespace, "server", _NEEDED["store"]["rules"])
    token = api_server.new_token(namespace, "server")
    config = api_server.kubeconfig(tmp_path / "config", namespace, token)

    async def scenario() -> None:
        store = KubernetesStore(Kubernetes({"KUBECONFIG": str(config)}), heartbeat_seconds=0.1)
        try:
            await use_everything(store, api_server, namespace)
        finally:
            await store.close()

    asyncio.run(scenario())

    events = [*api_server.audited(f"system:serviceaccount:{namespace}:server")]
    refused = [event["requestURI"] for event in events if event["responseStatus"]["code"] in {401, 403}]
    assert [] == refused
    assert verbs_of(_NEEDED["store"]["rules"]) == used_verbs(events)
    assert {namespace} == {event["objectRef"].get("namespace") for event in events}


def test_the_verbs_are_those_that_the_authenticator_uses(
    api_server: KubeApiServer, namespace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the manifests that the command prints, which kubectl applies."""
    api_server.new_account(namespace, "reviewer")
    main(["role", f"{namespace}:reviewer"])
    manifests = capsys.readouterr().out
    for manifest in yaml.safe_load_all(manifests):
        manifest["metadata"]["name"] += f"-{namespace}"
        if "roleRef" in manifest:
            manifest["roleRef"]["name"] += f"-{namespace}"
        api_server.apply(json.dumps(manifest))
    config = api_server.kubeconfig(tmp_path / "config", namespace, api_server.new_token(namespace, "reviewer"))

    async def scenario() -> str:
        api = Kubernetes({"KUBECONFIG": str(config)})
        try:
            authenticator = ReviewAuthenticator(api, audiences=["mx"], allowed=[f"{namespace}:reviewer"])
            return await authenticator.authenticate(Call(api_server.new_token(namespace, "reviewer", ["mx"])))
        finally:
            await api.close()

    name = asyncio.run(scenario())

    assert f"system:serviceaccount:{namespace}:reviewer" == name
    assert verbs_of(_NEEDED["authenticator"]["rules"]) == used_verbs(api_server.audited(name))


def test_the_printed_resources_are_those_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    """For people without the chart."""
    main(["crds"])

    kinds = [each["spec"]["names"]["kind"] for each in yaml.safe_load_all(capsys.readouterr().out)]
    assert ["ModelSource", "ModelSourceContent", "SourceHeartbeats"] == kinds
    with pytest.raises(SystemExit):
        main(["role", "no-namespace"])
