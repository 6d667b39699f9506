"""The examples for Kubernetes: valid manifests and values, with names that the chart, images and settings have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from devtools import settings_reference
from devtools.packages import ROOT, pyproject
from modelexpress_core.cli.app import build_app
from modelexpress_core.settings import variables
from modelexpress_core.uri import ModelURI
from tests.support.chart_cases import APIS, VERSIONS
from tests.support.charts import Manifests, render, schema_errors

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("helm")]

FOLDER = ROOT / "examples" / "k8s"
FILES = sorted(FOLDER.glob("*.yaml"))
PAGE = ROOT / "docs" / "kubernetes.md"

#: Kinds of others, whose schemas are not those of Kubernetes. Of them the containers are checked, which are.
FOREIGN = {"ClusterStorageContainer", "DynamoGraphDeployment", "InferenceService"}

#: Values of charts of others.
OTHER_CHARTS = {"dynamo-values.yaml", "llm-d-values.yaml"}

#: Variables of vLLM and KServe.
OTHER_VARIABLES = {"STORAGE_URI", "VLLM_PLUGINS"}

VERSION = pyproject(ROOT)["project"]["version"]
EACH = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
MANIFESTS = pytest.mark.parametrize(
    "file", [file for file in FILES if not file.stem.endswith("-values")], ids=lambda file: file.stem
)
OF_OUR_CHART = [file for file in FILES if file.stem.endswith("-values") and file.name not in OTHER_CHARTS]


def documents(file: Path) -> list[Any]:
    return list(yaml.safe_load_all(file.read_text()))


def containers(part: Any) -> Iterator[dict[str, Any]]:
    """Each container in a manifest or in values, wherever it is."""
    if isinstance(part, dict):
        if "image" in part:
            yield part
        for value in part.values():
            yield from containers(value)
    elif isinstance(part, list):
        for value in part:
            yield from containers(value)


def all_containers(file: Path) -> list[dict[str, Any]]:
    return [container for document in documents(file) for container in containers(document)]


@pytest.mark.parametrize("version", VERSIONS)
@MANIFESTS
def test_manifests_fit_the_schemas(file: Path, version: str) -> None:
    """Of three versions of Kubernetes; of kinds of others, which are named above, their containers."""
    found = documents(file)

    assert [] == schema_errors(found, version, FOREIGN)
    assert {each["kind"] for each in found} <= FOREIGN | {"Deployment", "Namespace", "Service", "ServiceAccount"}


@pytest.mark.parametrize("version", VERSIONS)
@EACH
def test_containers_fit_the_schemas(file: Path, version: str) -> None:
    """As containers of a pod, less what a chart of others takes besides."""
    others = {"modelCommand", "mountModelVolume"}
    found = [
        {"name": "main", **{key: value for key, value in container.items() if key not in others}}
        for container in all_containers(file)
    ]
    for container in found:  # mounts need no volumes here
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": file.stem}, "spec": {"containers": [container]}}

        assert [] == schema_errors([pod], version)


@pytest.mark.parametrize("file", OF_OUR_CHART, ids=lambda file: file.stem)
@pytest.mark.parametrize("version", VERSIONS)
def test_values_are_those_of_the_chart(file: Path, version: str) -> None:
    """The chart takes them, and its objects fit the schemas; 1.27 and 1.32 lack the API of the injection."""
    (values,) = documents(file)
    if "injection" in values and not VERSIONS[version]:
        values["injection"]["enabled"] = False

    assert [] == schema_errors(render(values, kubernetes=f"{version}.0", apis=(*APIS, *VERSIONS[version])), version)


@EACH
def test_variables_are_settings(file: Path) -> None:
    """Each is read by a package of this repository, or by vLLM or KServe."""
    known = {name for _, cls in settings_reference.classes() for name in variables(cls)}
    named = {entry["name"] for container in all_containers(file) for entry in container.get("env", ())}

    assert set() == named - known - OTHER_VARIABLES


@EACH
def test_commands_exist(file: Path) -> None:
    """Each command of `mx`, with a URI whose scheme is of a package in the worker's image."""
    known = {command.name or command.callback.__name__ for command in build_app().registered_commands}  # type: ignore[union-attr]

    for container in all_containers(file):
        command = container.get("command", [])
        if command[:1] == ["mx"]:
            assert command[1] in known
            if command[1] == "vllm":
                assert ModelURI.parse(command[2]).scheme in {"az", "gs", "hf", "mx", "mxs", "s3"}
                assert "--" in command


@EACH
def test_images_are_those_of_the_dockerfiles(file: Path) -> None:
    """In the current version. Dynamo's image is made of Dynamo's."""
    names = {"modelexpress-server", "vllm-modelexpress", "dynamo-vllm-modelexpress"}

    for container in all_containers(file):
        name, _, tag = container["image"].partition(":")
        assert (name in names, tag) == (True, VERSION)


@EACH
def test_names_are_those_of_the_chart(file: Path) -> None:
    """The address of the server, with a port of its Service, and the ConfigMap."""
    text, made = file.read_text(), render()
    ports = {port["port"] for port in made.one("Service", "model-express-server")["spec"]["ports"]}

    url = made.one("ConfigMap", "model-express-client")["data"]["MODEL_EXPRESS_URL"]
    for address in re.findall(r"mxs?://([^/ ]+)/", text):  # a token goes to this address alone
        assert url == f"http://{address}"
    for host, port in re.findall(r"(model-express-server[\w.-]*):(\d+)", text):
        assert host in {
            f"model-express-server{end}" for end in ("", ".model-express", ".model-express.svc.cluster.local")
        }
        assert int(port) in ports
    for container in all_containers(file):
        for source in container.get("envFrom", ()):
            made.one("ConfigMap", source["configMapRef"]["name"])


@MANIFESTS
def test_volumes_and_accounts_fit_together(file: Path) -> None:
    """Mounted volumes exist, selectors match, accounts are made, and names of ports differ."""
    found = Manifests(documents(file))

    for deployment in found.of("Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
        (container,) = pod["containers"]
        assert [volume["name"] for volume in pod["volumes"]] == [each["name"] for each in container["volumeMounts"]]
        assert len({port["name"] for port in container["ports"]}) == len(container["ports"])
        numbers = {port["containerPort"] for port in container["ports"]}
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert {8000, *range(6555, 6555 + gpus), *range(7655, 7655 + gpus)} == numbers
        if "serviceAccountName" in pod:
            account = found.one("ServiceAccount", pod["serviceAccountName"])
            assert account["metadata"]["namespace"] == deployment["metadata"]["namespace"]


def test_workers_without_a_server_are_behind_their_service() -> None:
    """It is headless, selects the pods, is what they look up, and has a port of WorkerService for each rank."""
    found = Manifests(documents(FOLDER / "decentralised.yaml"))
    service, pod = found.one("Service"), found.workload["spec"]["template"]
    variables = {entry["name"]: entry["value"] for entry in found.server["env"]}

    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert "k8s-service" == variables["MX_METADATA_BACKEND"]
    assert service["metadata"]["name"] == variables["MX_K8S_SERVICE_PATTERN"]
    ports = {port["name"]: port["containerPort"] for port in found.server["ports"]}
    assert [ports["worker-0"], ports["worker-1"]] == [port["port"] for port in service["spec"]["ports"]]


@EACH
def test_the_page_explains_each(file: Path) -> None:
    """By a link to it."""
    assert f"(../examples/k8s/{file.name})" in PAGE.read_text()
