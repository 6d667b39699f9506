"""Loads from a GCS emulator on this machine, compared with raw clients and other libraries, with CPU time."""

from __future__ import annotations

from benchmarks.checkpoints import digest_of_directory, generated, sections
from benchmarks.measuring import Plan, Report
from benchmarks.stores import RUNAI, fastest, load_targets
from benchmarks.workers import Entry, measure, started
from devtools.fake_gcs import FakeGcs

__all__ = ["run"]

_RAW = ("raw sockets", "google-cloud-storage", "obstore")
_BUCKET, _PREFIX = "models", "large"


def run(plan: Plan) -> Report:
    """Measure."""
    directory = generated(plan.scratch, quick=plan.quick)
    total = sum(section.length for section in sections(directory))
    connections = plan.pick((1, 2, 4, 8, 16, 32), (1, 4))
    plan.say("starting fake-gcs-server and uploading ...")
    with FakeGcs(_BUCKET, backend="filesystem") as server:
        uri = server.upload(directory, _BUCKET, _PREFIX)
        server.restart()  # it keeps the memory that uploads took
        environ = server.environ()
        ours, theirs = "benchmarks.contenders", "benchmarks.gcs_contenders"
        bucket = {"directory": str(directory), "bucket": _BUCKET, "prefix": _PREFIX}
        with_uri = {"directory": str(directory), "uri": uri}
        with_paths = {
            "directory": str(directory),
            "paths": [f"{uri}/{section.name}" for section in sections(directory)],
        }
        runai = {
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": server.endpoint,
            "RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS": "1",
        }
        specifications = {
            "into": (f"{ours}:ModelExpressInto", with_uri, environ),
            "into unverified": (f"{ours}:ModelExpressInto", with_uri, {**environ, "MX_VERIFY_DIGESTS": "0"}),
            "state": (f"{ours}:ModelExpressState", with_uri, environ),
            "raw sockets": (f"{theirs}:RawSockets", bucket, environ),
            "google-cloud-storage": (f"{theirs}:GoogleCloudStorage", bucket, environ),
            "obstore": (f"{theirs}:Obstore", bucket, environ),
            **{
                f"{RUNAI} {count}": (
                    f"{ours}:RunaiStreamer",
                    with_paths,
                    {**environ, **runai, "RUNAI_STREAMER_CONCURRENCY": str(count)},
                )
                for count in plan.pick((4, 8, 16, 32), (4,))
            },
        }
        entries = [
            Entry("modelexpress load_into, digests verified", "into", {}, "touched"),
            Entry("modelexpress load_into, not verified", "into unverified", {}, "touched"),
            Entry("modelexpress load_state_dict, verified", "state", {}, "fresh"),
            *(Entry(name, name, {"connections": count}, "touched") for name in _RAW for count in connections),
            *(Entry(name, name, {}, "fresh") for name in specifications if name.startswith(RUNAI)),
        ]
        plan.say(f"{total / 1e9:.2f} GB from {uri}")
        with started(specifications) as (workers, not_started):
            measured, failed = measure(plan, workers, entries, digest_of_directory(directory))
    limit = fastest(measured, _RAW)
    return Report(
        "gcs",
        f"{total / 1e9:.2f} GB in 4 objects with CRC32C digests, on fake-gcs-server over loopback, where server and "
        "client share the CPUs; limit: the fastest of raw sockets, google-cloud-storage and obstore",
        [entry.row(total, limit) for entry in measured],
        load_targets(limit, measured, times_runai=1.3),
        [*not_started, *failed],
        plan.rounds,
        plan.quick,
    )
