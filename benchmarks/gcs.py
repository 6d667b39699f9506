"""Loads from a GCS emulator on this machine, compared with raw clients and other libraries, with CPU time."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.checkpoints import digest_of_directory, generated, sections
from benchmarks.measuring import Plan, Report, Target
from benchmarks.workers import Entry, measure, started
from devtools.fake_gcs import FakeGcs

__all__ = ["run"]

_RAW = ("raw sockets", "google-cloud-storage", "obstore")
_RUNAI = "runai-model-streamer"
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
                f"{_RUNAI} {count}": (
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
            *(Entry(name, name, {}, "fresh") for name in specifications if name.startswith(_RUNAI)),
        ]
        plan.say(f"{total / 1e9:.2f} GB from {uri}")
        with started(specifications) as (workers, not_started):
            measured, failed = measure(plan, workers, entries, digest_of_directory(directory))
    raw = [entry.seconds for entry in measured if entry.worker in _RAW]
    limit = min(raw) if raw else None
    return Report(
        "gcs",
        f"{total / 1e9:.2f} GB in 4 objects with CRC32C digests, on fake-gcs-server over loopback, where server and "
        "client share the CPUs; limit: the fastest of raw sockets, google-cloud-storage and obstore",
        [entry.row(total, limit) for entry in measured],
        _targets(limit, measured),
        [*not_started, *failed],
        plan.rounds,
        plan.quick,
    )


def _targets(limit: float | None, measured: Sequence[Entry]) -> list[Target]:
    seconds = {entry.worker: entry.seconds for entry in measured if not entry.setting}
    runai = min((value for name, value in seconds.items() if name.startswith(_RUNAI)), default=None)

    def ratio(above: float | None, name: str) -> float | None:
        return above / seconds[name] if above is not None and name in seconds else None

    return [
        Target("load_into touched memory, verified: goodput over the best raw client's", ratio(limit, "into"), 0.9),
        Target("load_into touched memory, not verified: the same", ratio(limit, "into unverified"), 0.9),
        Target(
            "load_into touched memory, verified: times as fast as the best runai-model-streamer",
            ratio(runai, "into"),
            1.3,
        ),
        Target("load_state_dict into fresh memory, verified: the same", ratio(runai, "state"), 1.3),
    ]
