"""Loads from a real Blob service on this machine, compared with raw clients and other libraries, with CPU time."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.checkpoints import digest_of_directory, generated, sections
from benchmarks.measuring import Plan, Report, Target
from benchmarks.stores import fastest
from benchmarks.workers import Entry, measure, started
from devtools.azurite import Azurite

__all__ = ["run"]

_RAW = ("raw sockets", "azure-storage-blob", "obstore")
_CONTAINER, _PREFIX = "models", "large"


def run(plan: Plan) -> Report:
    """Measure."""
    directory = generated(plan.scratch, quick=plan.quick)
    total = sum(section.length for section in sections(directory))
    connections = plan.pick((1, 2, 4, 8, 16), (1, 4))
    plan.say("starting Azurite and uploading ...")
    with Azurite(_CONTAINER) as server:
        uri = server.upload(directory, _CONTAINER, _PREFIX)
        environ = server.environ()
        here = "benchmarks.contenders"
        container = {"directory": str(directory), "container": _CONTAINER, "prefix": _PREFIX}
        with_uri = {"directory": str(directory), "uri": uri}
        specifications = {
            "into": (f"{here}:ModelExpressInto", with_uri, environ),
            "state": (f"{here}:ModelExpressState", with_uri, environ),
            "raw sockets": (f"{here}:BlobSockets", {**container, "sas": server.sas(_CONTAINER)}, environ),
            "azure-storage-blob": (f"{here}:BlobSdk", container, environ),
            "obstore": (f"{here}:BlobObstore", container, environ),
        }
        entries = [
            Entry("modelexpress load_into", "into", {}, "touched"),
            Entry("modelexpress load_state_dict", "state", {}, "fresh"),
            *(Entry(name, name, {"connections": count}, "touched") for name in _RAW for count in connections),
        ]
        plan.say(f"{total / 1e9:.2f} GB from {uri}")
        with started(specifications) as (workers, not_started):
            measured, failed = measure(plan, workers, entries, digest_of_directory(directory))
    limit = fastest(measured, _RAW)
    return Report(
        "azure",
        f"{total / 1e9:.2f} GB in 4 blobs without digests, in Azurite over loopback, where server and client share the "
        "CPUs; limit: the fastest of raw sockets, azure-storage-blob and obstore",
        [entry.row(total, limit) for entry in measured],
        _targets(limit, measured),
        [*not_started, *failed],
        plan.rounds,
        plan.quick,
    )


def _targets(limit: float | None, measured: Sequence[Entry]) -> list[Target]:
    into = next((entry.seconds for entry in measured if entry.worker == "into"), None)
    ratio = limit / into if limit is not None and into is not None else None
    return [Target("load_into touched memory: goodput over the best raw client's", ratio, 0.9)]
