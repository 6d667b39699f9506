"""``python -m mx_kubernetes crds`` and ``role``: what a cluster needs before a server can keep its metadata in it."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.resources import files
from typing import Any

__all__ = ["main"]


def _manifests(account: str) -> list[dict[str, Any]]:
    """The roles of the service account ``namespace:name``, and their bindings."""
    namespace, _, name = account.partition(":")
    needed = json.loads(files("mx_kubernetes").joinpath("rbac.json").read_text("utf-8"))
    manifests: list[dict[str, Any]] = []
    for part, each in needed.items():
        prefix = "Cluster" if each["scope"] == "cluster" else ""
        metadata = {"name": f"model-express-{part}"} | ({} if prefix else {"namespace": namespace})
        api = "rbac.authorization.k8s.io"
        manifests += [
            {"apiVersion": f"{api}/v1", "kind": f"{prefix}Role", "metadata": metadata, "rules": each["rules"]},
            {
                "apiVersion": f"{api}/v1",
                "kind": f"{prefix}RoleBinding",
                "metadata": metadata,
                "roleRef": {"apiGroup": api, "kind": f"{prefix}Role", "name": metadata["name"]},
                "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": name}],
            },
        ]
    return manifests


def main(arguments: list[str] | None = None) -> None:
    """Print manifests for ``kubectl apply -f -``."""
    parser = argparse.ArgumentParser(prog="python -m mx_kubernetes", description="Print manifests for kubectl.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("crds", help="Print the custom resource definitions.")
    role = commands.add_parser("role", help="Print what the service account of the server may do.")
    role.add_argument("account", nargs="?", default="model-express:model-express", metavar="NAMESPACE:NAME")
    given = parser.parse_args(arguments)
    if given.command == "crds":
        sys.stdout.write(files("mx_kubernetes").joinpath("crds.yaml").read_text("utf-8"))
        return
    if not all(given.account.partition(":")):
        parser.error("the service account is written as namespace:name")
    sys.stdout.write("\n---\n".join(json.dumps(each, indent=2) for each in _manifests(given.account)) + "\n")


if __name__ == "__main__":
    main()
