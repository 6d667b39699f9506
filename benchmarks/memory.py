"""The memory that a load needs besides its destination."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import Destination, generated
from benchmarks.measuring import Plan, Report, Target, median
from devtools.seaweedfs import SeaweedFS

__all__ = ["run"]

_BUCKET = "models"


def run(plan: Plan) -> Report:
    """Measure."""
    directory = generated(plan.scratch, quick=plan.quick)
    rows: list[dict[str, Any]] = []
    with SeaweedFS(_BUCKET) as server:
        uri = server.upload(directory, _BUCKET, "model", checksum="CRC64NVME")
        cases: list[tuple[str, str, Mapping[str, str]]] = [
            ("file, straight into place", directory.as_uri(), {}),
            ("file, everything staged", directory.as_uri(), {"MX_FORCE_STAGING": "1"}),
            ("S3, straight into place", uri, server.environ()),
            ("S3, everything staged", uri, {**server.environ(), "MX_FORCE_STAGING": "1"}),
        ]
        for name, place, environ in cases:
            plan.say(f"{name} ...")
            runs = [_child(directory, place, environ) for _ in range(plan.rounds)]
            rows.append(
                {
                    "what": name,
                    "destination": "touched",
                    "peak over it MiB": median([run["peak_bytes"] for run in runs]) / 2**20,
                    "most MiB": max(run["peak_bytes"] for run in runs) / 2**20,
                    "GB/s": median([run["bytes"] / run["seconds"] / 1e9 for run in runs]),
                    "samples": runs,
                }
            )
    return Report(
        "memory",
        "load_into in a new process whose destination was touched; peak of its resident memory minus that right "
        "before the load; torch, the plugin and the SDK were imported by then, but no connection was open",
        rows,
        [
            Target(
                "most of all peaks over the destination",
                max(row["most MiB"] for row in rows),
                300.0,
                at_most=True,
                unit="MiB",
            )
        ],
        (),
        plan.rounds,
        plan.quick,
    )


def _child(directory: Path, uri: str, environ: Mapping[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory", str(directory), uri]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes (proc(5))."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def _main(directory: str, uri: str) -> None:
    import modelexpress_core as mx

    destination = Destination(Path(directory))
    mx.open_checkpoint(uri)  # imports what is needed
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _resident("VmRSS")
    report = mx.load_into(destination.tensors, uri)
    peak = _resident("VmHWM") - before
    print(json.dumps({"peak_bytes": peak, "seconds": report.seconds, "bytes": report.bytes_needed}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
