"""What the chart's MutatingAdmissionPolicy does to pods.

No API server that runs here has this API. So its expressions are evaluated by an implementation of CEL in Python, and
what they return is applied as the API server does it: lists are merged by the keys that Kubernetes merges them by.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Any

import celpy
import pytest
import yaml
from celpy import celtypes, json_to_cel

from devtools.packages import ROOT
from tests.support.charts import Manifests, RefusedError, render, schema_errors

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("helm")]

V1 = "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy"
BETA = "admissionregistration.k8s.io/v1beta1/MutatingAdmissionPolicy"

#: How server-side apply tells items of a list apart.
KEYS = {"containers": "name", "initContainers": "name", "env": "name", "volumeMounts": "mountPath"}

EVERYTHING = {
    "injection": {"enabled": True, "failurePolicy": "Fail"},
    "metadata": {"store": "kubernetes"},
    "tls": {"enabled": True, "secret": "server-tls", "clientCa": {"configMap": "bundle"}},
    "auth": {"mode": "kubernetes", "kubernetes": {"serviceAccounts": ["vllm:worker"], "audiences": ["mx"]}},
    "mesh": {"kind": "istio", "tensorParallelSize": 2},
    "client": {"env": {"MODEL_EXPRESS_NO_SHARED_STORAGE": "1"}},
}


def pod(**spec: Any) -> dict[str, Any]:
    """A pod with one container, and what ``spec`` adds."""
    containers = [{"name": "vllm", "image": "vllm"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "worker", "annotations": {"own": "kept"}},
        "spec": {"containers": containers, **spec},
    }


def evaluate(expression: str, variables: Mapping[str, Any]) -> Any:
    """The value of an expression of CEL.

    The implementation takes a dot for an attribute, so types such as Object.spec get names without dots.
    """
    types = set()

    def undotted(match: re.Match[str]) -> str:
        name = match[1].replace(".", "_")
        types.add(name)
        return name + "{"

    text = re.sub(r"\b(Object(?:\.\w+)*|JSONPatch)\{", undotted, expression)
    environment = celpy.Environment(annotations=dict.fromkeys(types, celtypes.MessageType))
    program = environment.program(environment.compile(text))
    value = program.evaluate({name: json_to_cel(value) for name, value in variables.items()})
    return json.loads(json.dumps(value, cls=celpy.CELJSONEncoder))


def merged(old: Any, new: Any, field: str = "") -> Any:
    """``old`` with ``new`` applied."""
    if isinstance(new, dict) and isinstance(old, dict):
        return {**old, **{name: merged(old.get(name), value, name) for name, value in new.items()}}
    if isinstance(new, list) and field in KEYS:
        key, items = KEYS[field], {each[KEYS[field]]: each for each in old or ()}
        for each in new:
            items[each[key]] = merged(items.get(each[key]), each)
        return list(items.values())
    assert not isinstance(new, list), f"an apply configuration may not set the list {field}"
    return new


def patched(item: dict[str, Any], patches: list[dict[str, Any]]) -> dict[str, Any]:
    """``item`` with the patches that the policy makes, all of which add a volume."""
    for patch in patches:
        assert patch["op"] == "add"
        if patch["path"] == "/spec/volumes":
            assert "volumes" not in item["spec"]
            item["spec"]["volumes"] = patch["value"]
        else:
            assert patch["path"] == "/spec/volumes/-"
            item["spec"]["volumes"].append(patch["value"])
    return item


def admitted(manifests: Manifests, item: Mapping[str, Any]) -> dict[str, Any]:
    """The pod that the API server makes of ``item``."""
    found: dict[str, Any] = copy.deepcopy(dict(item))
    for mutation in manifests.one("MutatingAdmissionPolicy")["spec"]["mutations"]:
        if mutation["patchType"] == "ApplyConfiguration":
            found = merged(found, evaluate(mutation["applyConfiguration"]["expression"], {"object": found}))
        else:
            found = patched(found, evaluate(mutation["jsonPatch"]["expression"], {"object": found}))
    return found


@pytest.fixture(scope="module")
def everything() -> Manifests:
    """The chart with each value that injection knows."""
    return render(EVERYTHING, apis=[V1])


def variables(container: Mapping[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container.get("env", ())}


def test_a_pod_gets_what_the_config_map_has(everything: Manifests) -> None:
    """In each container, with the authority, a token for this server, and the annotations for the mesh."""
    item = pod(initContainers=[{"name": "first", "image": "x"}])

    found = admitted(everything, item)

    client = everything.one("ConfigMap", "model-express-client")["data"]
    assert {"MODEL_EXPRESS_URL", "MX_TLS_CA_PATH", "MODEL_EXPRESS_NO_SHARED_STORAGE"} == set(client)
    for container in (*found["spec"]["containers"], *found["spec"]["initContainers"]):
        assert client == variables(container)
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"modelexpress-ca": "/etc/modelexpress/ca", "modelexpress-token": "/var/run/secrets/tokens"} == mounts
    volumes = {volume["name"]: volume for volume in found["spec"]["volumes"]}
    assert volumes["modelexpress-ca"]["configMap"] == {"name": "bundle", "optional": True}
    assert volumes["modelexpress-token"]["projected"]["sources"] == [
        {"serviceAccountToken": {"path": "modelexpress", "audience": "mx", "expirationSeconds": 3600}}
    ]
    assert found["metadata"]["annotations"] == {
        "own": "kept",
        "traffic.sidecar.istio.io/excludeInboundPorts": "5555,5556,7655,7656",
        "traffic.sidecar.istio.io/excludeOutboundPorts": "5555,5556,7655,7656,8002",
    }
    assert [] == schema_errors([found], "1.37")


def test_what_a_pod_sets_itself_stays(everything: Manifests) -> None:
    """Variables, and volumes where the policy would mount its own."""
    mount = {"name": "own", "mountPath": "/var/run/secrets/tokens"}
    item = pod(
        containers=[
            {
                "name": "vllm",
                "image": "x",
                "env": [{"name": "MODEL_EXPRESS_URL", "value": "other:8001"}, {"name": "A"}],
            },
            {"name": "beside", "image": "x", "volumeMounts": [mount]},
        ],
        volumes=[{"name": "own", "emptyDir": {}}],
    )

    vllm, beside = (found := admitted(everything, item))["spec"]["containers"]

    assert "other:8001" == next(each["value"] for each in vllm["env"] if each["name"] == "MODEL_EXPRESS_URL")
    assert {"name": "A"} in vllm["env"]
    assert mount in beside["volumeMounts"]
    assert ["modelexpress-ca", "own"] == sorted(mount["name"] for mount in beside["volumeMounts"])
    assert ["modelexpress-ca", "modelexpress-token", "own"] == sorted(each["name"] for each in found["spec"]["volumes"])


def test_a_second_time_changes_nothing(everything: Manifests) -> None:
    """The API server calls a policy again if another one changed the pod."""
    once = admitted(everything, pod())

    assert once == admitted(everything, once)


def test_without_tls_there_is_only_the_address() -> None:
    """No volumes, and no annotations."""
    found = admitted(render({"injection": {"enabled": True}}, apis=[V1]), pod())

    (container,) = found["spec"]["containers"]
    url = "http://model-express-server.model-express.svc.cluster.local:8080"
    assert [{"name": "MODEL_EXPRESS_URL", "value": url}] == container["env"]
    assert "volumes" not in found["spec"]
    assert found["metadata"] == pod()["metadata"]


def test_text_cannot_leave_its_place() -> None:
    """A value with quotation marks is a value, and no expression."""
    text = 'a" + object.metadata.name + "\\ $(X)'
    values = {"injection": {"enabled": True}, "client": {"env": {"MX_X": text}}}

    found = admitted(render(values, apis=[V1]), pod())

    assert variables(found["spec"]["containers"][0])["MX_X"] == text


def test_only_pods_of_labelled_namespaces_are_changed(everything: Manifests) -> None:
    """Unless they opt out, as those of the server do. The policy's binding names the policy."""
    policy, binding = everything.one("MutatingAdmissionPolicy"), everything.one("MutatingAdmissionPolicyBinding")

    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
    labels = binding["spec"]["matchResources"]["namespaceSelector"]["matchLabels"]
    assert {"modelexpress.io/inject": "enabled"} == labels
    (opt_out,) = policy["spec"]["matchConstraints"]["objectSelector"]["matchExpressions"]
    assert {"key": "modelexpress.io/inject", "operator": "NotIn", "values": ["disabled"]} == opt_out
    for own in (everything.workload["spec"]["template"], everything.one("Pod")):
        assert own["metadata"]["labels"]["modelexpress.io/inject"] == "disabled"
    (rule,) = policy["spec"]["matchConstraints"]["resourceRules"]
    assert (["CREATE"], ["pods"]) == (rule["operations"], rule["resources"])
    assert policy["spec"]["failurePolicy"] == "Fail"


@pytest.mark.parametrize(("version", "api"), [("1.37", V1), ("1.36", V1), ("1.35", BETA), ("1.34", BETA)])
def test_the_policy_fits_each_version_that_has_it(version: str, api: str) -> None:
    """By the schemas of these versions."""
    manifests = render(EVERYTHING, kubernetes=f"{version}.0", apis=[api])

    assert manifests.one("MutatingAdmissionPolicy")["apiVersion"] == api.rpartition("/")[0]
    assert [] == schema_errors(manifests, version)


def test_a_cluster_without_the_api_is_named() -> None:
    """The message says from which version on it is there."""
    with pytest.raises(RefusedError, match=r"since Kubernetes 1\.36"):
        render({"injection": {"enabled": True}}, kubernetes="1.33.0")


def test_the_example_needs_nothing_else() -> None:
    """The pods of the example with injection get address, authority and token, and fit the schema."""
    folder = ROOT / "examples" / "k8s"
    manifests = render(yaml.safe_load((folder / "kubernetes-values.yaml").read_text()), apis=[V1])
    namespace, _, deployment = yaml.safe_load_all((folder / "service-accounts.yaml").read_text())
    template = deployment["spec"]["template"]
    binding = manifests.one("MutatingAdmissionPolicyBinding")["spec"]["matchResources"]["namespaceSelector"]
    item = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "worker", **template["metadata"]}}

    found = admitted(manifests, item)

    assert binding["matchLabels"].items() <= namespace["metadata"]["labels"].items()
    (container,) = found["spec"]["containers"]
    assert manifests.one("ConfigMap", "model-express-client")["data"].items() <= variables(container).items()
    assert {"shm", "modelexpress-ca", "modelexpress-token"} == {each["name"] for each in found["spec"]["volumes"]}
    assert [] == schema_errors([found], "1.37")
