"""Loads from a real Blob service on this machine, compared with raw clients and other libraries, with CPU time."""

from __future__ import annotations

from benchmarks.checkpoints import generated
from benchmarks.comparison import Comparison
from benchmarks.measuring import Plan, Report
from devtools.azurite import Azurite

__all__ = ["run"]

_CONTAINER, _PREFIX = "models", "large"


def run(plan: Plan) -> Report:
    """Measure."""
    directory = generated(plan.scratch, quick=plan.quick)
    plan.say("starting Azurite and uploading ...")
    with Azurite(_CONTAINER) as server:
        here = "benchmarks.contenders"
        container = {"container": _CONTAINER, "prefix": _PREFIX}
        return Comparison(
            name="azure",
            about="in 4 blobs without digests, in Azurite over loopback, where server and client share the CPUs",
            directory=directory,
            uri=server.upload(directory, _CONTAINER, _PREFIX),
            environ=server.environ(),
            connections=plan.pick((1, 2, 4, 8, 16), (1, 4)),
            raw={
                "raw sockets": (f"{here}:BlobSockets", {**container, "sas": server.sas(_CONTAINER)}),
                "azure-storage-blob": (f"{here}:BlobSdk", container),
                "obstore": (f"{here}:BlobObstore", container),
            },
            digests=False,
        ).report(plan)
