"""Loads from a real S3 server on this machine, compared with raw clients and other libraries, with CPU time."""

from __future__ import annotations

from benchmarks.checkpoints import digest_of_directory, generated, sections
from benchmarks.measuring import Plan, Report
from benchmarks.stores import RUNAI, fastest, load_targets
from benchmarks.workers import Entry, measure, started
from devtools.seaweedfs import SeaweedFS

__all__ = ["run"]

_RAW = ("raw sockets", "boto3", "obstore")
_BUCKET, _PREFIX = "models", "large"


def run(plan: Plan) -> Report:
    """Measure."""
    directory = generated(plan.scratch, quick=plan.quick)
    total = sum(section.length for section in sections(directory))
    connections = plan.pick((1, 2, 4, 8, 16, 32), (1, 4))
    plan.say("starting SeaweedFS and uploading ...")
    with SeaweedFS(_BUCKET) as server:
        uri = server.upload(directory, _BUCKET, _PREFIX, checksum="CRC64NVME")
        environ = server.environ()
        here = "benchmarks.contenders"
        bucket = {"directory": str(directory), "bucket": _BUCKET, "prefix": _PREFIX}
        with_uri = {"directory": str(directory), "uri": uri}
        paths = [f"{uri}/{section.name}" for section in sections(directory)]
        unverified = {**environ, "MX_VERIFY_DIGESTS": "0"}
        specifications = {
            "into": (f"{here}:ModelExpressInto", with_uri, environ),
            "into unverified": (f"{here}:ModelExpressInto", with_uri, unverified),
            "state": (f"{here}:ModelExpressState", with_uri, environ),
            "streamed": (
                f"{here}:ModelExpressInto",
                with_uri,
                {**environ, "MX_PREFER": "s3=mx-streamer", "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"},
            ),
            "raw sockets": (f"{here}:RawSockets", bucket, environ),
            "boto3": (f"{here}:Boto3", bucket, environ),
            "obstore": (f"{here}:Obstore", bucket, environ),
            "s3torchconnector": (f"{here}:S3TorchConnector", bucket, environ),
            **{
                f"{RUNAI} {count}": (
                    f"{here}:RunaiStreamer",
                    {"directory": str(directory), "paths": paths},
                    {
                        **environ,
                        "RUNAI_STREAMER_CONCURRENCY": str(count),
                        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
                    },
                )
                for count in plan.pick((4, 8, 16, 32), (4,))
            },
        }
        entries = [
            Entry("modelexpress load_into, digests verified", "into", {}, "touched"),
            Entry("modelexpress load_into, not verified", "into unverified", {}, "touched"),
            Entry("modelexpress load_state_dict, verified", "state", {}, "fresh"),
            Entry("modelexpress with mx-streamer, verified", "streamed", {}, "touched"),
            *(Entry(name, name, {"connections": count}, "touched") for name in _RAW for count in connections),
            Entry("s3torchconnector", "s3torchconnector", {"connections": 4}, "touched"),
            *(Entry(name, name, {}, "fresh") for name in specifications if name.startswith(RUNAI)),
        ]
        plan.say(f"{total / 1e9:.2f} GB from {uri}")
        with started(specifications) as (workers, not_started):
            measured, failed = measure(plan, workers, entries, digest_of_directory(directory))
    limit = fastest(measured, _RAW)
    return Report(
        "s3",
        f"{total / 1e9:.2f} GB in 4 objects with CRC64NVME digests, on SeaweedFS over loopback, where server and "
        "client share the CPUs; limit: the fastest of raw sockets, boto3 and obstore",
        [entry.row(total, limit) for entry in measured],
        load_targets(limit, measured, times_runai=1.0),
        [*not_started, *failed],
        plan.rounds,
        plan.quick,
    )
