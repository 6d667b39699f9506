"""Rendering the Helm chart, and checking manifests against the schemas of Kubernetes."""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from devtools import helm
from devtools.helm_chart import CHART

__all__ = ["NAMESPACE", "RELEASE", "Manifests", "RefusedError", "render", "run_helm", "schema_errors"]

RELEASE = NAMESPACE = "model-express"

Manifest = dict[str, Any]


class RefusedError(Exception):
    """Helm or the chart refused values; the text is helm's message."""


def run_helm(*arguments: str, environ: Mapping[str, str] | None = None) -> str:
    """What helm prints.

    Raises:
        RefusedError: It failed.
    """
    done = subprocess.run(
        [helm.binary(), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={"PATH": "/usr/bin:/bin", "HOME": tempfile.gettempdir(), **(environ or {})},
    )
    if done.returncode != 0:
        raise RefusedError(done.stderr)
    return done.stdout


class Manifests(list[Manifest]):
    """The objects of a release."""

    def of(self, kind: str) -> list[Manifest]:
        """All of one kind."""
        return [each for each in self if each["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Manifest:
        """The only one of a kind, or the one with that name."""
        found = [each for each in self.of(kind) if name in {None, each["metadata"]["name"]}]
        assert len(found) == 1, f"{len(found)} of {kind} {name or ''}: {[each['metadata']['name'] for each in found]}"
        return found[0]

    @property
    def workload(self) -> Manifest:
        """What runs the server."""
        (found,) = [each for each in self if each["kind"] in {"Deployment", "StatefulSet", "DaemonSet"}]
        return found

    @property
    def pod(self) -> Manifest:
        """The specification of the server's pods."""
        spec: Manifest = self.workload["spec"]["template"]["spec"]
        return spec

    @property
    def server(self) -> Manifest:
        """The server's container."""
        (found,) = self.pod["containers"]
        container: Manifest = found
        return container

    def environ(self, secrets: Mapping[str, str] = {}) -> dict[str, str]:
        """The environment of the server, as Kubernetes makes it. ``secrets`` has values by ``name/key``."""
        found = {"POD_NAME": f"{self.workload['metadata']['name']}-0", "POD_IP": "10.0.0.7"}
        for entry in self.server["env"]:
            name = entry["name"]
            if name in found:
                continue
            if "value" in entry:
                value = str(entry["value"])
                for other, text in found.items():
                    value = value.replace(f"$({other})", text)
                found[name] = value
            else:
                key = entry["valueFrom"]["secretKeyRef"]
                found[name] = secrets[f"{key['name']}/{key['key']}"]
        return found


def render(
    values: Mapping[str, Any] | None = None,
    *,
    kubernetes: str = "1.37.0",
    apis: Iterable[str] = (),
    release: str = RELEASE,
    notes: bool = False,
) -> Manifests:
    """The objects that the chart makes of ``values``.

    Args:
        values: Values that differ from the defaults.
        kubernetes: Version of the cluster.
        apis: Further APIs that the cluster has, as group/version or group/version/kind.
        release: Name of the release.
        notes: Return the notes instead, as one object.

    Raises:
        RefusedError: The chart refuses the values.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values or {}, file)
        file.flush()
        command = ["install", "--dry-run=client", "-o", "json"] if notes else ["template"]
        options = [option for api in apis for option in ("--api-versions", api)]
        options += [] if notes else ["--kube-version", kubernetes]
        printed = run_helm(*command, release, str(CHART), "--namespace", NAMESPACE, "--values", file.name, *options)
    if notes:
        return Manifests([{"kind": "Notes", "text": json.loads(printed)["info"]["notes"]}])
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it
    return Manifests(each for each in yaml.load_all(printed, loader) if each is not None)


#: Kinds of others, whose schemas are not those of Kubernetes; what is checked of them, tests check themselves.
FOREIGN = frozenset({"Certificate", "ServiceMonitor"})


def schema_errors(manifests: Sequence[Manifest], kubernetes: str, foreign: Iterable[str] = FOREIGN) -> list[str]:
    """What the schemas of a version of Kubernetes, 1.37 for example, say against ``manifests``, besides ``foreign``."""
    checked = (each for each in manifests if each["kind"] not in foreign)
    return [error for each in checked if (error := _schema_error(json.dumps(each, sort_keys=True), kubernetes))]


@functools.lru_cache(maxsize=4096)
def _schema_error(manifest: str, kubernetes: str) -> str:
    data = json.loads(manifest)
    named = f"{data['kind']} {data['metadata']['name']}"
    validator = _validator(data["apiVersion"], data["kind"], kubernetes)
    if validator is None:
        return f"{named}: Kubernetes {kubernetes} has no {data['apiVersion']}"
    return "; ".join(f"{named}: {error.message} at {list(error.path)}" for error in validator.iter_errors(data))


@functools.cache
def _validator(api_version: str, kind: str, kubernetes: str) -> Any:
    """The strict schema of a kind, from the package kubernetes-validate; None if the version has no such kind.

    The package's own function reads all definitions of the version for each object, which takes 40 ms.
    """
    from jsonschema.validators import Draft202012Validator
    from referencing import Resource

    group, _, version = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.partition(".")[0], version) if part)
    file = _schemas(kubernetes) / f"{name}.json"
    if not file.is_file():
        return None
    schema = json.loads(file.read_text())
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(kubernetes))


@functools.cache
def _definitions(kubernetes: str) -> Any:
    from referencing import Registry, Resource

    definitions = json.loads((_schemas(kubernetes) / "_definitions.json").read_text())
    return Resource.from_contents(definitions) @ Registry()


def _schemas(kubernetes: str) -> Path:
    import kubernetes_validate

    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    found: Path = folder / f"v{kubernetes}.0-local-strict"
    assert found.is_dir(), f"kubernetes-validate has no schemas of Kubernetes {kubernetes}"
    return found
