"""Loads from a GCS emulator on this machine, compared with raw clients and other libraries, with CPU time."""

from __future__ import annotations

from benchmarks.checkpoints import generated
from benchmarks.comparison import Comparison
from benchmarks.measuring import Plan, Report
from devtools.fake_gcs import FakeGcs

__all__ = ["run"]

_BUCKET, _PREFIX = "models", "large"


def run(plan: Plan) -> Report:
    """Measure."""
    directory = generated(plan.scratch, quick=plan.quick)
    plan.say("starting fake-gcs-server and uploading ...")
    with FakeGcs(_BUCKET, backend="filesystem") as server:
        uri = server.upload(directory, _BUCKET, _PREFIX)
        server.restart()  # it keeps the memory that uploads took
        here = "benchmarks.gcs_contenders"
        bucket = {"bucket": _BUCKET, "prefix": _PREFIX}
        return Comparison(
            name="gcs",
            about="in 4 objects with CRC32C digests, on fake-gcs-server over loopback, where server and client share "
            "the CPUs",
            directory=directory,
            uri=uri,
            environ=server.environ(),
            connections=plan.pick((1, 2, 4, 8, 16, 32), (1, 4)),
            raw={
                "raw sockets": (f"{here}:RawSockets", bucket),
                "google-cloud-storage": (f"{here}:GoogleCloudStorage", bucket),
                "obstore": (f"{here}:Obstore", bucket),
            },
            runai={
                "CLOUD_STORAGE_EMULATOR_ENDPOINT": server.endpoint,
                "RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS": "1",
            },
        ).report(plan)
