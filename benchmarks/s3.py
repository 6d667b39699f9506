"""Loads from a real S3 server on this machine, compared with raw clients and other libraries, with CPU time."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.checkpoints import digest_of_directory, generated, sections
from benchmarks.measuring import Plan, Report, Target
from benchmarks.workers import Entry, measure, started
from devtools.seaweedfs import SeaweedFS

__all__ = ["run"]

_RAW = ("raw sockets", "boto3", "obstore")
_RUNAI = "runai-model-streamer"
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
                f"{_RUNAI} {count}": (
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
            *(Entry(name, name, {}, "fresh") for name in specifications if name.startswith(_RUNAI)),
        ]
        plan.say(f"{total / 1e9:.2f} GB from {uri}")
        with started(specifications) as (workers, not_started):
            measured, failed = measure(plan, workers, entries, digest_of_directory(directory))
    raw = [entry.seconds for entry in measured if entry.worker in _RAW]
    limit = min(raw) if raw else None
    return Report(
        "s3",
        f"{total / 1e9:.2f} GB in 4 objects with CRC64NVME digests, on SeaweedFS over loopback, where server and "
        "client share the CPUs; limit: the fastest of raw sockets, boto3 and obstore",
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
            1.0,
        ),
        Target("load_state_dict into fresh memory, verified: the same", ratio(runai, "state"), 1.0),
    ]
