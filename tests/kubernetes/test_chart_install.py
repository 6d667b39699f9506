"""The chart on a real API server: installed, upgraded, rolled back, tested and uninstalled by helm.

The API server is of Kubernetes 1.20, and there is no kubelet: no pod runs. What newer versions have besides, their
schemas check in test_chart.py.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from devtools import helm
from devtools.helm_chart import CHART
from devtools.kube_apiserver import KubeApiError, KubeApiServer
from devtools.packages import ROOT
from devtools.processes import started
from modelexpress_core.contracts.identity import Engine, SourceIdentity
from modelexpress_core.errors import AccessDeniedError
from modelexpress_core.sources.cache_management import CacheManagement
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from tests.support.chart_cases import APIS, CASES
from tests.support.charts import NAMESPACE, RefusedError, render, run_helm
from tests.support.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.xdist_group("kubernetes outages")]

NAME = "model-express"
SERVER = f"{NAME}-server"
#: Kinds of others, which the API server does not have.
FOREIGN = {"Certificate", "ClusterStorageContainer", "DynamoGraphDeployment", "InferenceService", "ServiceMonitor"}

KUBERNETES = {"metadata": {"store": "kubernetes"}, "workload": {"replicas": 2}}


class Cluster:
    """A namespace of the API server, as helm and the tests use it.

    Args:
        api: The API server.
        directory: For files.
    """

    def __init__(self, api: KubeApiServer, directory: Path) -> None:
        self.api = api
        self.namespace = api.new_namespace()
        self._directory = directory
        self._kubeconfig = api.kubeconfig(directory / "kubeconfig", self.namespace)

    def command(self, verb: str, *options: str) -> list[str]:
        """A command of helm."""
        return [verb, NAME, *options, "--namespace", self.namespace, "--kubeconfig", str(self._kubeconfig)]

    def helm(self, verb: str, *options: str, values: Mapping[str, Any] | None = None) -> str:
        """What helm prints.

        Raises:
            RefusedError: It failed.
        """
        file = self._directory / "values.json"
        file.write_text(json.dumps(values or {}))
        chart = (
            (str(CHART), "--values", str(file)) if verb in {"install", "upgrade"} and "--chart" not in options else ()
        )
        return run_helm(*self.command(verb, *chart, *options), environ={"HOME": str(self._directory)})

    def get(self, path: str, group: str = "api/v1") -> dict[str, Any]:
        """An object of the namespace."""
        return self.api.request("GET", f"/{group}/namespaces/{self.namespace}/{path}")

    def missing(self, path: str, group: str = "api/v1") -> bool:
        """Whether an object of the namespace does not exist."""
        try:
            self.get(path, group)
        except KubeApiError as exc:
            return exc.status == 404
        return False

    def environ(self) -> dict[str, Any]:
        """The variables of the server."""
        pod = self.get(f"deployments/{SERVER}", "apis/apps/v1")["spec"]["template"]["spec"]
        return {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}


@pytest.fixture(scope="module")
def api() -> Iterator[KubeApiServer]:
    """An API server of this file's own: others need the custom resources that tests remove here."""
    with KubeApiServer() as server:
        yield server


@pytest.fixture
def cluster(api: KubeApiServer, tmp_path: Path) -> Iterator[Cluster]:
    """A namespace of its own; the custom resources, which the whole cluster has, are removed afterwards."""
    found = Cluster(api, tmp_path)
    yield found
    for name in definitions(api):
        api.request("DELETE", f"{_DEFINITIONS}/{name}")
    assert eventually(lambda: not definitions(api))


_DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def definitions(api: KubeApiServer) -> list[str]:
    """Names of the custom resources that the cluster has."""
    return [each["metadata"]["name"] for each in api.request("GET", _DEFINITIONS)["items"]]


SOURCES = ["modelsourcecontents.modelexpress.io", "modelsources.modelexpress.io", "sourceheartbeats.modelexpress.io"]


def test_a_release_lives_as_a_user_expects(cluster: Cluster) -> None:
    """It is installed, upgraded to another store, rolled back, and uninstalled; custom resources stay."""
    cluster.helm("install")
    ports = {port["port"]: port["targetPort"] for port in cluster.get(f"services/{SERVER}")["spec"]["ports"]}
    assert {8080: "grpc", 8001: "grpc", 8002: "bulk"} == ports
    url = f"http://{SERVER}.{cluster.namespace}.svc.cluster.local:8080"
    assert {"MODEL_EXPRESS_URL": url} == cluster.get(f"configmaps/{NAME}-client")["data"]
    deployment = cluster.get(f"deployments/{SERVER}", "apis/apps/v1")
    probe = deployment["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]
    assert {"port": 8003} == probe["tcpSocket"]  # 1.20 has no probes of gRPC
    assert "memory://" == cluster.environ()["MX_METADATA_URI"]
    assert [] == definitions(cluster.api)

    cluster.helm("upgrade", values=KUBERNETES)
    assert f"kubernetes://{cluster.namespace}" == cluster.environ()["MX_METADATA_URI"]
    assert cluster.get(f"deployments/{SERVER}", "apis/apps/v1")["spec"]["replicas"] == 2
    assert cluster.get(f"poddisruptionbudgets/{SERVER}", "apis/policy/v1beta1")["spec"]["maxUnavailable"] == 1
    assert sorted(SOURCES) == sorted(definitions(cluster.api))
    group = "apis/modelexpress.io/v1alpha1"
    path = f"/{group}/namespaces/{cluster.namespace}/modelsourcecontents"
    body = {
        "apiVersion": "modelexpress.io/v1alpha1",
        "kind": "ModelSourceContent",
        "metadata": {"name": "x"},
        "data": "eA==",
    }
    assert eventually(lambda: _created(cluster.api, path, body))

    with pytest.raises(RefusedError, match=r"metadata\.store is memory"):
        cluster.helm("upgrade", values={"workload": {"replicas": 3}})
    assert f"kubernetes://{cluster.namespace}" == cluster.environ()["MX_METADATA_URI"]

    cluster.helm("rollback", "1")
    assert "memory://" == cluster.environ()["MX_METADATA_URI"]
    assert cluster.get(f"deployments/{SERVER}", "apis/apps/v1")["spec"]["replicas"] == 1
    assert cluster.missing(f"roles/{SERVER}", "apis/rbac.authorization.k8s.io/v1")
    assert sorted(SOURCES) == sorted(definitions(cluster.api))

    cluster.helm("uninstall")
    assert cluster.missing(f"services/{SERVER}")
    assert cluster.missing(f"deployments/{SERVER}", "apis/apps/v1")
    assert "x" == cluster.get("modelsourcecontents/x", group)["metadata"]["name"]


def _created(api: KubeApiServer, path: str, body: object) -> bool:
    """Whether an object could be made: a definition is served a moment after it was."""
    try:
        api.request("POST", path, body)
    except KubeApiError as exc:
        if exc.status != 404:
            raise
        return False
    return True


def test_an_upgrade_changes_custom_resources(cluster: Cluster, tmp_path: Path) -> None:
    """A newer chart brings a new field, which Helm would not bring from its directory crds."""
    newer = tmp_path / "newer"
    shutil.copytree(CHART, newer)
    file = newer / "files" / "crds.yaml"
    text = file.read_text()
    definition = next(iter(yaml.safe_load_all(text)))
    fields = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    fields["later"] = {"type": "string"}
    file.write_text("\n---\n".join([yaml.safe_dump(definition), *text.split("\n---\n")[1:]]))
    cluster.helm("install", values=KUBERNETES)

    run_helm(*cluster.command("upgrade", str(newer), "--reuse-values"), environ={"HOME": str(tmp_path)})

    found = cluster.api.request("GET", f"{_DEFINITIONS}/modelsources.modelexpress.io")
    schema = found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert {"type": "string"} == schema["properties"]["spec"]["properties"]["later"]


def test_a_second_release_leaves_or_takes_the_custom_resources(cluster: Cluster, tmp_path: Path) -> None:
    """As the chart's page says: with crds.install=false, or with --take-ownership when the first one is gone."""
    second = tmp_path / "second"
    second.mkdir()
    other = Cluster(cluster.api, second)
    cluster.helm("install", values=KUBERNETES)

    with pytest.raises(RefusedError, match="ownership"):
        other.helm("install", values=KUBERNETES)
    other.helm("install", values={**KUBERNETES, "crds": {"install": False}})
    other.helm("uninstall")
    cluster.helm("uninstall")
    other.helm("install", "--take-ownership", values=KUBERNETES)

    definition = other.api.request("GET", f"{_DEFINITIONS}/{SOURCES[0]}")
    assert other.namespace == definition["metadata"]["annotations"]["meta.helm.sh/release-namespace"]


def test_the_claim_of_the_cache_stays(cluster: Cluster) -> None:
    """When the release is uninstalled; the next one of this name uses it."""
    values = {"cache": {"volume": "claim", "size": "1Gi"}}
    claim = f"persistentvolumeclaims/{SERVER}-cache"
    cluster.helm("install", values=values)
    uid = cluster.get(claim)["metadata"]["uid"]

    cluster.helm("uninstall")
    assert uid == cluster.get(claim)["metadata"]["uid"]
    cluster.helm("install", values=values)

    assert uid == cluster.get(claim)["metadata"]["uid"]


def test_the_server_has_the_rights_that_it_needs_and_no_others(cluster: Cluster) -> None:
    """In its namespace, for records; in the cluster, to have tokens reviewed. The API server itself decides."""
    auth = {"mode": "kubernetes", "acceptPlaintextTokens": True, "kubernetes": {"serviceAccounts": ["vllm:worker"]}}
    cluster.helm("install", values={**KUBERNETES, "auth": auth})
    rights = json.loads((CHART / "files" / "rbac.json").read_text())

    granted = {
        (group, resource, verb)
        for rule in (*rights["store"]["rules"], *rights["authenticator"]["rules"])
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }

    assert [] == [each for each in sorted(granted) if not _may(cluster, cluster.namespace, *each)]
    foreign = [each for each in sorted(granted) if each[1] != "tokenreviews"]
    assert [] == [each for each in foreign if _may(cluster, "default", *each)]
    others = [("", "secrets", "get"), ("", "pods", "list"), ("modelexpress.io", "modelsources", "deletecollection")]
    assert [] == [each for each in others if _may(cluster, cluster.namespace, *each)]


def _may(cluster: Cluster, namespace: str, group: str, resource: str, verb: str) -> bool:
    """Whether the server's service account may do that."""
    attributes = {"namespace": namespace, "group": group, "resource": resource, "verb": verb}
    user = f"system:serviceaccount:{cluster.namespace}:{SERVER}"
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "resourceAttributes": attributes},
    }
    answer = cluster.api.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    return bool(answer["status"]["allowed"])


@pytest.mark.parametrize(("phase", "code"), [("Succeeded", 0), ("Failed", 1)])
def test_helm_test_waits_for_the_pod(cluster: Cluster, phase: str, code: int) -> None:
    """It makes the pod that asks for health, and ends as the pod does; the test takes the part of the kubelet."""
    cluster.helm("install")
    command: Sequence[str] = [helm.binary(), *cluster.command("test", "--timeout", "120s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        try:
            assert eventually(lambda: not cluster.missing(f"pods/{SERVER}-test")), running.communicate(timeout=1)
            pod = cluster.get(f"pods/{SERVER}-test")
            cluster.api.request(
                "PATCH",
                f"/api/v1/namespaces/{cluster.namespace}/pods/{SERVER}-test/status",
                {"status": {"phase": phase}},
                content_type="application/merge-patch+json",
            )
            printed = running.communicate(timeout=120)[0]
        finally:
            running.kill()

    assert ["health"] == pod["spec"]["containers"][0]["args"]
    assert (running.returncode != 0) == (code != 0), printed


# -- what schemas do not check -----------------------------------------------------------------------------------------

#: Paths of kinds whose plural is another word than the kind with an s.
_PLURALS = {"NetworkPolicy": "networkpolicies"}


@pytest.fixture(scope="module")
def namespaces(api: KubeApiServer) -> list[str]:
    """Those that the chart's cases and the examples name."""
    found = [NAMESPACE, "vllm"]
    for name in found:
        api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    return found


def refusals(api: KubeApiServer, manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why the API server would refuse objects: it checks names, labels, ports and references, and makes nothing."""
    found = []
    for each in manifests:
        kind, version = each["kind"], each["apiVersion"]
        if kind == "Namespace" or kind in FOREIGN:
            continue
        plural = _PLURALS.get(kind, f"{kind.lower()}s")
        cluster_wide = kind.startswith("Cluster") or kind == "CustomResourceDefinition"
        place = "" if cluster_wide else f"namespaces/{each['metadata'].get('namespace', NAMESPACE)}/"
        try:
            api.request("POST", f"/{'apis' if '/' in version else 'api'}/{version}/{place}{plural}?dryRun=All", each)
        except KubeApiError as exc:
            found.append(f"{kind} {each['metadata']['name']}: {exc}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_api_server_takes_each_case(name: str, api: KubeApiServer, namespaces: list[str]) -> None:
    """All objects, as the chart writes them for this version."""
    assert NAMESPACE in namespaces

    assert [] == refusals(api, render(CASES[name], kubernetes="1.20.2", apis=APIS))


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "k8s").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_api_server_takes_each_example(file: Path, api: KubeApiServer, namespaces: list[str]) -> None:
    """All objects; those of KServe and Dynamo are of kinds that it does not have, and values are none."""
    assert "vllm" in namespaces

    assert [] == refusals(api, [each for each in yaml.safe_load_all(file.read_text()) if "kind" in each])


# -- the server that the chart describes -------------------------------------------------------------------------------


class Pod:
    """The server's process with what a kubelet would give it, on loopback; ends with its block.

    Args:
        cluster: Where the chart is installed.
        directory: For its files.

    Attributes:
        url: Its address.
    """

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        directory.mkdir()
        pod = cluster.get(f"deployments/{SERVER}", "apis/apps/v1")["spec"]["template"]["spec"]
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.url = f"127.0.0.1:{listening.getsockname()[1]}"
        config = directory / "server.yaml"
        config.write_text(cluster.get(f"configmaps/{SERVER}")["data"]["server.yaml"])
        token = cluster.api.new_token(cluster.namespace, pod["serviceAccountName"])
        kubeconfig = cluster.api.kubeconfig(directory / "kubeconfig", cluster.namespace, token)
        given = {name: value for name, value in cluster.environ().items() if value is not None}
        assert given["MX_CACHE_ENDPOINT"] == "$(POD_IP):8001"
        here = {"MX_SERVER_CONFIG": str(config), "KUBECONFIG": str(kubeconfig), "HOME": str(directory)}
        here |= {"MX_CACHE_ENDPOINT": self.url, "MX_AUTH_TOKEN_PATH": str(directory / "token")}
        (volume,) = [each for each in pod["volumes"] if each["name"] == "account-token"]
        audience = volume["projected"]["sources"][0]["serviceAccountToken"]["audience"]
        own = cluster.api.new_token(cluster.namespace, pod["serviceAccountName"], [audience])
        (directory / "token").write_text(own)
        # Flags win over the variables of the chart, whose ports and paths are those of a container.
        options = ["--host", "127.0.0.1", "--port", self.url.partition(":")[2]]
        options += ["--metrics-port", "0", "--health-port", "0", "--cache-dir", str(directory / "cache")]
        command = [sys.executable, "-m", "modelexpress_core", "serve", *options]
        self._process = started(command, directory, {**given, **here})
        self._log = directory / "log"

    def __enter__(self) -> str:
        """The address of the server, when it serves."""
        eventually(lambda: "serving on" in self._log.read_text() or self._process.poll() is not None)
        if self._process.poll() is not None:
            raise AssertionError(self._log.read_text())
        return self.url

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def with_accounts(cluster: Cluster) -> Cluster:
    """The chart with custom resources, and the service account `worker` as the one that is answered."""
    for name in ("worker", "stranger"):
        cluster.api.new_account(cluster.namespace, name)
    accounts = [f"{cluster.namespace}:worker"]
    auth = {"mode": "kubernetes", "acceptPlaintextTokens": True, "kubernetes": {"serviceAccounts": accounts}}
    config = {
        "heartbeat_timeout_seconds": 120,
        "cache": {"sources": ["file"], "min_free_bytes": "1MiB"},
        "limits": {"records_bytes": "1GiB"},
    }
    cluster.helm("install", values={**KUBERNETES, "auth": auth, "config": config})
    return cluster


def test_the_server_works_with_what_the_chart_gives_it(with_accounts: Cluster, tmp_path: Path) -> None:
    """Its variables, its file and the rights of its account suffice: it reviews tokens, and keeps records.

    A worker with a token for this server publishes; one of another account, or with a token for others, is refused.
    """
    api, namespace = with_accounts.api, with_accounts.namespace
    tokens = {
        "worker": api.new_token(namespace, "worker", ["modelexpress"]),
        "stranger": api.new_token(namespace, "stranger", ["modelexpress"]),
        "other audience": api.new_token(namespace, "worker", ["others"]),
    }

    def publish(url: str, caller: str) -> Any:
        file = tmp_path / caller
        file.write_text(tokens[caller])
        identity = SourceIdentity("acme/model", backend_framework=Engine.VLLM)
        worker = p2p_pb2.WorkerMetadata(worker_rank=3, status=2)
        with contextlib.closing(ServerClient.from_env({"MX_AUTH_TOKEN_PATH": str(file)}, url=url)) as client:
            return client.publish(identity, worker, "w-1")

    with Pod(with_accounts, tmp_path / "pod") as url:
        published = publish(url, "worker")
        for caller in ("stranger", "other audience"):
            with pytest.raises(AccessDeniedError):
                publish(url, caller)

    assert published.success, published.message
    (source,) = with_accounts.get("modelsources", "apis/modelexpress.io/v1alpha1")["items"]
    assert ("acme/model", 3, True) == (source["spec"]["modelName"], source["spec"]["rank"], source["status"]["ready"])
    assert f"system:serviceaccount:{namespace}:worker" in source["spec"]["publisher"]


def test_replicas_of_the_chart_read_from_each_other(with_accounts: Cluster, tmp_path: Path) -> None:
    """With the tokens that the chart projects: the storage is read once for both."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}" * 10_000)
    token = tmp_path / "token"
    token.write_text(with_accounts.api.new_token(with_accounts.namespace, "worker", ["modelexpress"]))

    def download(url: str) -> Any:
        with contextlib.closing(CacheManagement.from_env(url, {"MX_AUTH_TOKEN_PATH": str(token)})) as client:
            client.ensure(f"file{model}", "", weights=True, on_progress=lambda _done, _whole: None)
            return client.stats()

    with Pod(with_accounts, tmp_path / "first") as first, Pod(with_accounts, tmp_path / "second") as second:
        stats = [download(first), download(second)]

    assert [20_000, 20_000] == [each.size_bytes for each in stats]
    assert [20_000, 0] == [each.origin_bytes for each in stats]
