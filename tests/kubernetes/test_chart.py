"""The Helm chart: its objects fit Kubernetes, each other and the server's settings; other values are refused."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from devtools import helm_chart, settings_reference
from devtools.helm_chart import CHART
from devtools.packages import ROOT, pyproject
from modelexpress_core.cli.serve import _SECTIONS
from modelexpress_core.server.config import Config, read_config
from modelexpress_core.server.settings import CacheSettings, LimitSettings, LogSettings, ServerSettings
from modelexpress_core.settings import describe, variables
from modelexpress_core.wire.settings import AuthSettings, TlsSettings
from tests.support.chart_cases import APIS, CASES, REFUSED, VERSIONS, below
from tests.support.charts import NAMESPACE, RELEASE, Manifests, RefusedError, render, run_helm, schema_errors

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("helm")]

#: Variables of pods that no setting reads: what other variables name, and the home directory.
OTHER_VARIABLES = {"HOME", "POD_IP", "POD_NAME"}


@pytest.fixture(scope="session")
def rendered() -> Mapping[tuple[str, str], Manifests]:
    """The objects of each case for each version of Kubernetes."""
    keys = [(case, version) for case in CASES for version in VERSIONS]

    def one(key: tuple[str, str]) -> Manifests:
        case, version = key
        return render(CASES[case], kubernetes=f"{version}.0", apis=(*APIS, *VERSIONS[version]))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(keys, pool.map(one, keys), strict=True))


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, rendered: Mapping[tuple[str, str], Manifests]) -> Manifests:
    """The objects of each case, for the newest version."""
    return rendered[str(request.param), "1.37"]


@pytest.fixture
def manifests(rendered: Mapping[tuple[str, str], Manifests]) -> Any:
    """The objects of a case that a test names, for the newest version."""
    return lambda name: rendered[name, "1.37"]


# -- what Kubernetes says ----------------------------------------------------------------------------------------------


def test_helm_finds_nothing_to_complain_about() -> None:
    """``helm lint --strict`` takes the chart with its own values."""
    assert "0 chart(s) failed" in run_helm("lint", str(CHART), "--strict")


def test_a_package_of_the_chart_is_complete(tmp_path: Path) -> None:
    """What `helm package` writes makes the same objects: no template reads a file outside it."""
    run_helm("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("*.tgz")
    options = ("--namespace", NAMESPACE, "--set", "metadata.store=kubernetes,metrics.dashboard.enabled=true")

    assert run_helm("template", RELEASE, str(CHART), *options) == run_helm("template", RELEASE, str(package), *options)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_objects_fit_the_schemas(name: str, version: str, rendered: Mapping[tuple[str, str], Manifests]) -> None:
    """Of three versions of Kubernetes, strictly: no field that the version does not have."""
    assert [] == schema_errors(rendered[name, version], version)


def test_the_schemas_find_what_is_wrong(manifests: Any) -> None:
    """A field that does not exist, one that is missing, and a kind that the version does not have."""
    wrong = copy.deepcopy(manifests("defaults").workload)
    container = wrong["spec"]["template"]["spec"]["containers"][0]
    container["readOnly"] = True
    del container["ports"][0]["containerPort"]

    (errors,) = schema_errors([wrong], "1.32")

    assert "'readOnly' was unexpected" in errors
    assert "'containerPort' is a required property" in errors
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": "x"},
    }
    (errors,) = schema_errors([policy], "1.32")
    assert "1.32 has no admissionregistration.k8s.io/v1" in errors


def test_kinds_without_a_schema_are_of_others(rendered: Mapping[tuple[str, str], Manifests]) -> None:
    """Nothing else goes without the check above."""
    groups = {
        each["apiVersion"]
        for objects in rendered.values()
        for each in objects
        if each["kind"] in {"Certificate", "ServiceMonitor"}
    }

    assert {"cert-manager.io/v1", "monitoring.coreos.com/v1"} == groups


def test_parts_of_a_release_fit_together(case: Manifests) -> None:
    """Selectors match pods, ports have names, volumes exist, and accounts, ConfigMaps and roles are used."""
    workload = case.workload
    labels = workload["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in case.server["ports"]}

    assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for service in case.of("Service"):
        assert service["spec"]["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(ports)
    for policy in (*case.of("PodDisruptionBudget"), *case.of("NetworkPolicy")):
        selector = policy["spec"].get("selector") or policy["spec"]["podSelector"]
        assert selector["matchLabels"].items() <= labels.items()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert case.server[probe]["grpc"]["port"] == ports["health"]
    own = [claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())]
    for pod, claims in ((case.pod, own), (case.one("Pod")["spec"], [])):
        volumes = [*(volume["name"] for volume in pod["volumes"]), *claims]
        mounted = [mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]]
        assert sorted(volumes) == sorted(mounted)
        assert len({mount["mountPath"] for c in pod["containers"] for mount in c["volumeMounts"]}) == len(mounted)
    made = {(each["kind"], each["metadata"]["name"]) for each in case}
    for binding in (*case.of("RoleBinding"), *case.of("ClusterRoleBinding")):
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in made
        assert binding["subjects"][0]["name"] == case.pod["serviceAccountName"]
    assert ("ConfigMap", case.pod["volumes"][0]["configMap"]["name"]) in made
    assert len(made) == len(case)


def test_names_are_in_the_namespace_of_the_release(case: Manifests) -> None:
    """Besides those of the whole cluster, which have it in their names, as two releases may be in one cluster."""
    for each in case:
        if each["kind"] in {"ClusterRole", "ClusterRoleBinding"}:
            assert each["metadata"]["name"].startswith(f"{NAMESPACE}-")
        elif each["kind"] not in {"CustomResourceDefinition", "Secret"}:
            assert each["metadata"]["namespace"] == NAMESPACE


def test_other_versions_get_what_they_know(rendered: Mapping[tuple[str, str], Manifests]) -> None:
    """Kubernetes 1.20 has neither probes of gRPC nor policy/v1; 1.27 has no action sleep."""
    old = render({"workload": {"replicas": 2}, **_REDIS}, kubernetes="1.20.2")

    assert old.server["livenessProbe"]["tcpSocket"] == {"port": 8003}
    assert old.one("PodDisruptionBudget")["apiVersion"] == "policy/v1beta1"
    assert rendered["defaults", "1.27"].server["lifecycle"]["preStop"] == {"exec": {"command": ["sleep", "5"]}}
    assert rendered["defaults", "1.32"].server["lifecycle"]["preStop"] == {"sleep": {"seconds": 5}}


_REDIS = {"metadata": {"store": "redis", "redis": {"url": "redis://redis"}}}


# -- what a user gets --------------------------------------------------------------------------------------------------


def test_the_address_is_that_of_the_service(case: Manifests) -> None:
    """MODEL_EXPRESS_URL in the ConfigMap names the Service and a port of it; both ports lead to the server's."""
    service = next(each for each in case.of("Service") if each["spec"].get("clusterIP") != "None")
    client = next(each for each in case.of("ConfigMap") if each["metadata"]["name"].endswith("-client"))
    domain = "example.org" if service["metadata"]["name"] == "weights-server" else "cluster.local"
    tls = "MX_TLS_CERT_PATH" in {entry["name"] for entry in case.server["env"]}

    host = f"{service['metadata']['name']}.{NAMESPACE}.svc.{domain}"
    assert client["data"]["MODEL_EXPRESS_URL"] == f"{'https' if tls else 'http'}://{host}:8080"
    grpc = {port["port"]: port["targetPort"] for port in service["spec"]["ports"] if port["port"] != 8002}
    assert {8080: "grpc", 8001: "grpc"} == grpc


def test_the_service_has_the_name_that_clients_expect(manifests: Any) -> None:
    """For the release and the namespace of the README's command."""
    assert manifests("defaults").one("ConfigMap", "model-express-client")["data"] == {
        "MODEL_EXPRESS_URL": "http://model-express-server.model-express.svc.cluster.local:8080"
    }
    assert "weights-server" == manifests("other names").workload["metadata"]["name"]
    assert "mx-model-express-server" == render(release="mx").workload["metadata"]["name"]


def test_long_names_fit() -> None:
    """Kubernetes takes 63 characters; a statefulset adds a hyphen and ten to its own in a label."""
    longest = render({"workload": {"kind": "statefulset"}, "cache": {"volume": "claim"}}, release="r" * 53)

    assert len(longest.workload["metadata"]["name"]) <= 63 - 11
    assert all(len(each["metadata"]["name"]) <= 63 for each in longest)


def test_removed_values_have_defaults() -> None:
    """As with `--set config=null`, with which Helm removes a value."""
    case = render({"config": None, "resources": None, "podSecurityContext": {"runAsUser": None, "fsGroup": None}})

    assert "{}" == case.one("ConfigMap", "model-express-server")["data"]["server.yaml"].strip()
    assert "runAsUser" not in case.pod["securityContext"]
    assert [] == schema_errors(case, "1.37")


def test_notes_name_what_is_made() -> None:
    """The ConfigMap, the next commands, and that every caller is answered."""
    (notes,) = render(notes=True)

    assert "rollout status deployment/model-express-server" in notes["text"]
    assert "helm test model-express --namespace model-express" in notes["text"]
    assert "configMapRef: {name: model-express-client}" in notes["text"]
    assert "auth.mode is none" in notes["text"]


@pytest.mark.parametrize("name", CASES)
def test_notes_can_be_written(name: str) -> None:
    """For each case: helm renders them when it installs, and not with the templates."""
    (notes,) = render(CASES[name], notes=True)

    assert notes["text"].startswith("ModelExpress ")
    assert "<" not in notes["text"]


def test_a_cache_is_of_one_server(manifests: Any) -> None:
    """A pod with a volume that lasts ends before the next one starts; without one, the next one is ready first."""
    assert manifests("a claim").workload["spec"]["strategy"] == {"type": "Recreate"}
    assert manifests("a directory of the node").workload["spec"]["strategy"] == {"type": "Recreate"}
    assert manifests("defaults").workload["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    template = manifests("a volume for each replica").workload["spec"]["volumeClaimTemplates"][0]
    assert template["spec"]["resources"]["requests"]["storage"] == "100Gi"


def test_uninstalling_keeps_models_and_records(manifests: Any) -> None:
    """The claim and the custom resources; Helm keeps objects with this annotation, and changes them in upgrades."""
    keep = {"helm.sh/resource-policy": "keep"}

    assert manifests("a claim").one("PersistentVolumeClaim")["metadata"]["annotations"] == keep
    crds = manifests("custom resources").of("CustomResourceDefinition")
    assert [keep] * 3 == [crd["metadata"]["annotations"] for crd in crds]
    assert [] == manifests("custom resources of others").of("CustomResourceDefinition")
    assert not (CHART / "crds").exists()  # whose content Helm never upgrades


def test_a_disruption_budget_needs_a_second_replica(manifests: Any) -> None:
    """With one replica it would block the drain of its node."""
    assert manifests("replicas with redis").one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    for name in ("defaults", "a cache on each node"):
        assert [] == manifests(name).of("PodDisruptionBudget")


def test_the_pod_lives_until_it_has_drained(case: Manifests) -> None:
    """The grace period is longer than the time for Services to forget the pod and the drain together."""
    pause = case.server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)

    assert case.pod["terminationGracePeriodSeconds"] >= pause + float(case.environ(_ANY)["MX_DRAIN_SECONDS"]) + 10


class _Any(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "redis://:password@redis:6379/0"


_ANY = _Any()


def test_a_monitor_needs_its_api(manifests: Any) -> None:
    """Without it the release is installed nevertheless, and the notes say so."""
    values = {"metrics": {"serviceMonitor": {"enabled": True}}}

    monitor = manifests("everything else").one("ServiceMonitor")
    assert monitor["spec"]["endpoints"][0]["authorization"]["credentials"] == {"name": "metrics", "key": "token"}
    pods = manifests("everything else").one("Service", "model-express-server-pods")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= pods["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in pods["spec"]["ports"]}
    assert [] == render(values).of("ServiceMonitor")
    assert "No ServiceMonitor was written" in render(values, notes=True)[0]["text"]


def test_the_dashboard_is_that_of_the_docs(manifests: Any) -> None:
    """As Grafana's sidecar finds it."""
    found = manifests("everything else").one("ConfigMap", "model-express-dashboard")

    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["modelexpress.json"]) == json.loads(
        (ROOT / "docs" / "grafana-dashboard.json").read_text()
    )


def test_further_objects_are_templates(manifests: Any) -> None:
    """As YAML and as text."""
    names = {each["metadata"]["name"] for each in manifests("everything else").of("Secret")}

    assert {"model-express-more", "model-express-text"} == names


# -- replicas ----------------------------------------------------------------------------------------------------------


def test_replicas_know_each_other_by_names_that_certificates_have(manifests: Any) -> None:
    """A statefulset's pods have names below the headless Service, as the certificate does; others have addresses."""
    stateful = manifests("tokens of service accounts")
    endpoint = stateful.environ(_ANY)["MX_CACHE_ENDPOINT"]

    assert endpoint == "model-express-server-0.model-express-server-pods.model-express.svc.cluster.local:8001"
    assert stateful.workload["spec"]["serviceName"] == "model-express-server-pods"
    assert stateful.one("Service", "model-express-server-pods")["spec"]["clusterIP"] == "None"
    names = stateful.one("Certificate")["spec"]["dnsNames"]
    assert "*." + endpoint.partition(".")[2].partition(":")[0] in names
    assert "model-express-server.model-express.svc.cluster.local" in names
    assert manifests("replicas with redis").environ()["MX_CACHE_ENDPOINT"] == "10.0.0.7:8001"
    assert "MX_CACHE_ENDPOINT" not in manifests("defaults").environ()
    tls = {"tls": {"enabled": True, "secret": "x"}, "workload": {"replicas": 2}, **_REDIS}
    assert "MX_CACHE_ENDPOINT" not in render(tls).environ()
    assert "Each replica downloads models by itself" in render(tls, notes=True)[0]["text"]


def test_replicas_may_read_from_each_other(manifests: Any) -> None:
    """Where callers are authenticated, each has a token, and the server's own service account is allowed."""
    accounts = manifests("tokens of service accounts")
    environ = accounts.environ(_ANY)
    volume = next(each for each in accounts.pod["volumes"] if each["name"] == "account-token")

    assert (
        "vllm:worker,model-express:model-express-server" == environ["MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS"]
    )
    assert volume["projected"]["sources"][0]["serviceAccountToken"]["audience"] == "modelexpress"
    plain = manifests("tokens in plain text between replicas").environ()
    assert plain["MX_AUTH_TOKEN_PATH"] == "/etc/modelexpress/own-token/token"
    assert plain["MX_AUTH_TOKEN_PLAINTEXT"] == "1"


def test_the_bulk_channel_is_there_where_readers_find_the_replica_of_their_ticket(case: Manifests) -> None:
    """Each of several tells its address, if it has one. A daemonset's Service leads to the one of the node."""
    several = case.workload["kind"] != "DaemonSet" and case.workload["spec"]["replicas"] > 1
    service = next(each for each in case.of("Service") if each["spec"].get("clusterIP") != "None")
    bulk = 8002 in {port["port"] for port in service["spec"]["ports"]}
    environ = case.environ(_ANY)

    found = not several or "MX_CACHE_ENDPOINT" in environ
    assert bulk == ("MODEL_EXPRESS_CACHE_DIRECTORY" in environ and found)
    assert environ.get("MX_SERVER_BULK_PORT", "0") == ("8002" if bulk else "0")
    assert ("internalTrafficPolicy" in service["spec"]) == (case.workload["kind"] == "DaemonSet")


# -- settings ----------------------------------------------------------------------------------------------------------


def test_variables_are_settings(case: Manifests) -> None:
    """Each variable that the chart sets is read by the server or by a plugin of this repository."""
    known = {name for _, cls in settings_reference.classes() for name in variables(cls)}
    client = next(each for each in case.of("ConfigMap") if each["metadata"]["name"].endswith("-client"))
    set_here = {*(entry["name"] for entry in case.server["env"]), *client["data"]}

    extra = {entry["name"] for values in CASES.values() for entry in values.get("extraEnv", ())}
    assert set() == set_here - known - OTHER_VARIABLES - extra


def _config(case: Manifests, tmp_path: Path) -> Config:
    """What the server makes of its environment and its file."""
    file = tmp_path / "server.yaml"
    name = next(each for each in case.pod["volumes"] if each["name"] == "config")["configMap"]["name"]
    file.write_text(case.one("ConfigMap", name)["data"]["server.yaml"])
    environ = case.environ(_ANY)
    assert environ["MX_SERVER_CONFIG"] == "/etc/modelexpress/config/server.yaml"
    return read_config(_SECTIONS, environ, path=str(file))


def test_the_server_takes_them(case: Manifests, tmp_path: Path) -> None:
    """Ports are those of the container, and directories are where volumes are mounted."""
    config = _config(case, tmp_path)
    server, cache = config.get(ServerSettings), config.get(CacheSettings)
    ports = {port["name"]: port["containerPort"] for port in case.server["ports"]}
    mounts = {mount["mountPath"] for mount in case.server["volumeMounts"]}

    assert {"grpc": server.port, "health": server.health_port, "metrics": server.metrics_port} == {
        name: port for name, port in ports.items() if name != "bulk"
    }
    assert server.host in {"0.0.0.0", "[::]"}
    if cache.directory is not None:
        assert cache.directory in mounts
        assert ports.get("bulk", 0) == cache.bulk_port
    tls, auth = config.get(TlsSettings), config.get(AuthSettings)
    for path in (*tls.files, auth.tokens, server.metrics_token):
        assert path is None or str(Path(path).parent) in mounts, path
    auth.check(tls)


def test_the_cache_leaves_a_tenth_of_its_volume(manifests: Any, tmp_path: Path) -> None:
    """A volume that is full evicts the pod, or refuses what the server writes besides models."""
    assert 90 << 30 == _config(manifests("defaults"), tmp_path).get(CacheSettings).max_bytes
    assert (2 << 40) * 9 // 10 == _config(manifests("a claim"), tmp_path).get(CacheSettings).max_bytes
    assert 1 << 40 == _config(manifests("a claim that exists"), tmp_path).get(CacheSettings).max_bytes


def test_config_is_the_file_of_the_server(manifests: Any, tmp_path: Path) -> None:
    """Each value, with the type that the server expects."""
    config = _config(manifests("everything else"), tmp_path)

    assert (120.0, 15.0) == (
        config.get(ServerSettings).heartbeat_timeout_seconds,
        config.get(ServerSettings).reaper_interval_seconds,
    )
    cache, limits = config.get(CacheSettings), config.get(LimitSettings)
    assert (("hf",), 20 << 30, True) == (cache.sources, cache.min_free_bytes, cache.may_delete)
    assert (4 << 30, 1000) == (limits.records_bytes, limits.entries)
    assert LogSettings("debug", "json") == config.get(LogSettings)


def test_every_setting_has_one_place(tmp_path: Path) -> None:
    """What config takes and what templates set are all settings of the server's file, none of them twice."""
    taken = helm_chart.load_schema()["properties"]["config"]["properties"]
    for section, cls in helm_chart.SECTIONS.items():
        offered = set(taken[section]["properties"]) if section else set(taken) - set(helm_chart.SECTIONS)
        owned = helm_chart.OWNED.get(section, frozenset())
        keys = {key for key, _ in _keys(cls)}
        assert offered | owned == keys
        assert not offered & owned
    environ = set(_variables_of_cases())
    for section, names in helm_chart.OWNED.items():
        missing = {variable for key, variable in _keys(helm_chart.SECTIONS[section]) if key in names} - environ
        assert set() == missing


def _keys(cls: type) -> Iterator[tuple[str, str]]:
    """The fields of a settings class, with their variables."""
    from modelexpress_core.settings import field_names

    return zip(field_names(cls), (row.name for row in describe(cls, {}, owner="")), strict=True)


def _variables_of_cases() -> Iterator[str]:
    """Variables that some case sets."""
    for values in (CASES["everything else"], CASES["tokens of service accounts"], CASES["tokens"]):
        yield from (entry["name"] for entry in render(values, apis=APIS).server["env"])


def test_large_numbers_stay_numbers(tmp_path: Path) -> None:
    """Helm reads numbers as floating point, and must not write 2e+07."""
    case = render({"config": {"removal_seconds": 20000000, "limits": {"entries": 4000000}}})

    config = _config(case, tmp_path)

    assert 20000000 == config.get(ServerSettings).removal_seconds
    assert 4000000 == config.get(LimitSettings).entries


# -- safety ------------------------------------------------------------------------------------------------------------


def test_containers_may_do_nothing_special(case: Manifests) -> None:
    """No root, no writable root file system, no capabilities, the default seccomp profile; no links to Services."""
    for pod in (case.pod, case.one("Pod")["spec"]):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["enableServiceLinks"] is False
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "limits" in container["resources"]
    prepared = [container["securityContext"] for container in case.pod.get("initContainers", ())]
    assert all(context["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]} for context in prepared)


def test_only_a_server_that_asks_the_api_server_has_its_token(case: Manifests) -> None:
    """And only then has it rights: in its namespace for records, in the cluster for the review of tokens alone."""
    environ = case.environ(_ANY)
    store = environ["MX_METADATA_URI"].startswith("kubernetes://")
    reviews = environ["MX_AUTH_MODE"] == "kubernetes"

    assert case.pod["automountServiceAccountToken"] == (store or reviews)
    assert not any(account["automountServiceAccountToken"] for account in case.of("ServiceAccount"))
    if case.pod["serviceAccountName"] == "prepared":
        assert [] == [*case.of("Role"), *case.of("ClusterRole")]
    else:
        assert bool(case.of("Role")) == store
        assert bool(case.of("ClusterRole")) == reviews
    for role in case.of("ClusterRole"):
        (rule,) = role["rules"]
        assert rule == {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}
    for role in case.of("Role"):
        assert not any("*" in (*rule["verbs"], *rule["resources"], *rule["apiGroups"]) for rule in role["rules"])


def test_secrets_are_named_and_never_written(case: Manifests) -> None:
    """The chart makes no Secret, and values hold none."""
    assert [] == [each for each in case.of("Secret") if each["metadata"]["name"] not in _EXTRA_SECRETS]
    for volume in case.pod["volumes"]:
        assert volume.get("secret", {}).get("defaultMode", 0o440) == 0o440


_EXTRA_SECRETS = {"model-express-more", "model-express-text"}


def test_a_network_policy_lets_in_whom_it_names(manifests: Any) -> None:
    """Clients and replicas to gRPC and bulk, Prometheus to metrics; egress only where rules are given."""
    grpc, metrics, health = manifests("everything else").one("NetworkPolicy")["spec"]["ingress"]

    assert [{"port": "grpc", "protocol": "TCP"}, {"port": "bulk", "protocol": "TCP"}] == grpc["ports"]
    replicas, clients = grpc["from"]
    assert replicas["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == RELEASE
    assert clients == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "vllm"}}}
    assert ([{"port": "metrics", "protocol": "TCP"}], 1) == (metrics["ports"], len(metrics["from"]))
    assert {"ports": [{"port": "health", "protocol": "TCP"}]} == health


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str) -> None:
    """With what is wrong, and what to do."""
    values, words = REFUSED[name]

    with pytest.raises(RefusedError) as refused:
        render(values)

    text = " ".join(str(refused.value).split())
    assert [] == [word for word in words if word not in text], text


def test_every_refusal_is_provoked() -> None:
    """Each message of the template is in a test above."""
    written = (CHART / "templates" / "_validate.tpl").read_text().count("fail ")

    by_schema = {"a word that YAML takes for no", "a size without a unit", "a password in values"}
    by_schema |= {name for name in REFUSED if "does not exist" in name or "owns" in name}
    assert written <= len(set(REFUSED) - by_schema)


def test_every_value_is_declared() -> None:
    """Objects of the schema are closed; maps of labels, variables and parts of pods are open, and are named here."""
    open_maps = {path for path, part in below("", helm_chart.load_schema()) if _is_open(part)}

    assert {
        "affinity",
        "client.env",
        "commonLabels",
        "extraEnv[].valueFrom",
        "extraObjects[]",
        "extraVolumeMounts[]",
        "extraVolumes[]",
        "global",
        "metrics.dashboard.annotations",
        "metrics.dashboard.labels",
        "metrics.serviceMonitor.labels",
        "networkPolicy.clients[]",
        "networkPolicy.egress[]",
        "networkPolicy.metrics[]",
        "nodeSelector",
        "podAnnotations",
        "podLabels",
        "podSecurityContext",
        "resources",
        "securityContext",
        "service.annotations",
        "serviceAccount.annotations",
        "tolerations[]",
    } == open_maps


def _is_open(part: Mapping[str, Any]) -> bool:
    kinds = part.get("type", ())
    return "object" in ((kinds,) if isinstance(kinds, str) else kinds) and part.get("additionalProperties") is not False


# -- what is written from other files ----------------------------------------------------------------------------------


def test_the_chart_is_written_from_the_code() -> None:
    """The schema, the values and the README's tables, by ``python -m devtools.helm_chart``."""
    schema = helm_chart.load_schema()
    page = (CHART / "README.md").read_text()

    assert helm_chart.schema_text(schema) == (CHART / "values.schema.json").read_text()
    assert helm_chart.values_text(schema) == (CHART / "values.yaml").read_text()
    assert helm_chart.with_table(page, schema) == page


@pytest.mark.parametrize("name", helm_chart.COPIES)
def test_copies_are_equal(name: str) -> None:
    """Of files that the chart shares with docs and packages."""
    assert helm_chart.COPIES[name].read_bytes() == (CHART / "files" / name).read_bytes()


def test_versions_are_those_of_the_package() -> None:
    """The image's tag is the chart's appVersion by default."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = pyproject(ROOT)["project"]["version"]

    assert (version, version) == (chart["appVersion"], chart["version"])
    assert render().server["image"] == f"modelexpress-server:{version}"


def test_the_catalogue_names_the_custom_resources() -> None:
    """The annotation for Artifact Hub."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    named = yaml.safe_load(chart["annotations"]["artifacthub.io/crds"])
    crds = list(yaml.safe_load_all((CHART / "files" / "crds.yaml").read_text()))

    assert [(crd["spec"]["names"]["kind"], crd["metadata"]["name"]) for crd in crds] == [
        (each["kind"], each["name"]) for each in named
    ]
    columns = {column["name"] for column in crds[0]["spec"]["versions"][0]["additionalPrinterColumns"]}
    assert {"Ready", "Rank", "Age", "Bytes"} <= columns


# -- mesh --------------------------------------------------------------------------------------------------------------


def test_ports_past_the_mesh_are_those_of_the_ranks() -> None:
    """From the first port of each kind, one for each rank; Istio takes a list and Linkerd ranges."""
    istio = render({"mesh": {"kind": "istio", "tensorParallelSize": 2}}, notes=True)[0]["text"]
    linkerd = render({"mesh": {"kind": "linkerd", "tensorParallelSize": 8}}, notes=True)[0]["text"]
    defaults = {row.name: row.value for _, cls in settings_reference.classes() for row in describe(cls, {}, owner="")}

    assert 'traffic.sidecar.istio.io/excludeInboundPorts: "5555,5556,7655,7656"' in istio
    assert 'config.linkerd.io/skip-inbound-ports: "5555-5562,7655-7662"' in linkerd
    assert 'config.linkerd.io/skip-outbound-ports: "5555-5562,7655-7662,8002"' in linkerd
    assert "7655" == defaults["MX_BULK_PORT"]
