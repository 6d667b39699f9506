"""Loads from a real S3 server on this machine, compared with raw clients and other libraries, with CPU time."""

from __future__ import annotations

from benchmarks.checkpoints import generated
from benchmarks.comparison import Comparison
from benchmarks.measuring import Plan, Report
from benchmarks.workers import Entry
from devtools.seaweedfs import SeaweedFS

__all__ = ["run"]

_BUCKET, _PREFIX = "models", "large"

#: The engine of runai-model-streamer puts the bucket into the path, as the server wants it.
_RUNAI = {"RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"}


def run(plan: Plan) -> Report:
    """Measure."""
    directory = generated(plan.scratch, quick=plan.quick)
    plan.say("starting SeaweedFS and uploading ...")
    with SeaweedFS(_BUCKET) as server:
        uri = server.upload(directory, _BUCKET, _PREFIX, checksum="CRC64NVME")
        environ = server.environ()
        here = "benchmarks.contenders"
        bucket = {"bucket": _BUCKET, "prefix": _PREFIX}
        streamed = {**environ, **_RUNAI, "MX_PREFER": "s3=mx-streamer"}
        return Comparison(
            name="s3",
            about="in 4 objects with CRC64NVME digests, on SeaweedFS over loopback, where server and client share the "
            "CPUs",
            directory=directory,
            uri=uri,
            environ=environ,
            connections=plan.pick((1, 2, 4, 8, 16, 32), (1, 4)),
            raw={
                "raw sockets": (f"{here}:RawSockets", bucket),
                "boto3": (f"{here}:Boto3", bucket),
                "obstore": (f"{here}:Obstore", bucket),
            },
            others=[
                (
                    (f"{here}:ModelExpressInto", {"directory": str(directory), "uri": uri}, streamed),
                    Entry("modelexpress with mx-streamer, verified", "streamed", {}, "touched"),
                ),
                (
                    (f"{here}:S3TorchConnector", {"directory": str(directory), **bucket}, environ),
                    Entry("s3torchconnector", "s3torchconnector", {"connections": 4}, "touched"),
                ),
            ],
            runai=_RUNAI,
            times_runai=1.0,
        ).report(plan)
