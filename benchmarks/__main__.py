"""``python -m benchmarks [NAME ...] [--quick] [--rounds N] [--json FILE] [--scratch DIRECTORY]``."""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
from rich.console import Console

from benchmarks.measuring import Plan, Report, print_report, write_json

#: The default benchmarks, in the order in which they run.
BENCHMARKS = (
    "local",
    "s3",
    "gcs",
    "azure",
    "concurrency",
    "recording",
    "memory",
    "faults",
    "corruption",
    "control_plane",
    "p2p",
    "streaming",
    "errors",
)
#: Benchmarks that run only if named: they take long, or need another environment, or root.
_NAMED = ("following", "p2p_sources", "peer_faults", "vllm", "vllm_peers")

_RESULTS = Path(__file__).parent / "results"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure ratios, each from one run.")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"run this benchmark: {', '.join(BENCHMARKS)} (by default all of these), or {', '.join(_NAMED)}",
    )
    parser.add_argument("--quick", action="store_true", help="use small sizes, to check that the benchmarks work")
    parser.add_argument("--rounds", type=int, help="measure each contender so often; 5 by default, 1 with --quick")
    parser.add_argument("--json", type=Path, help="write the results to this file; by default below benchmarks/results")
    parser.add_argument("--scratch", type=Path, help="keep generated files in this directory, and reuse them")
    parsed = parser.parse_args(arguments)
    unknown = sorted(set(parsed.names) - {*BENCHMARKS, *_NAMED})
    if unknown:
        parser.error(f"unknown benchmarks: {', '.join(unknown)}; available are {', '.join(BENCHMARKS + _NAMED)}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks; the exit code is 0 even if targets are missed."""
    parsed = _arguments(arguments)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "CLOUD_STORAGE_", "GOOGLE_", "MX_", "RUNAI_", "STORAGE_EMULATOR_")):
            del os.environ[name]  # the benchmarks set these variables themselves
    os.environ["AWS_EC2_METADATA_DISABLED"] = os.environ["NO_GCE_CHECK"] = "true"
    reports: list[Report] = []
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as temporary:
        scratch = parsed.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        rounds = parsed.rounds or (1 if parsed.quick else 5)
        plan = Plan(rounds=rounds, quick=parsed.quick, scratch=scratch, console=console)
        for name in parsed.names or BENCHMARKS:
            plan.say(f"{name} ...")
            begun = time.monotonic()
            report = importlib.import_module(f"benchmarks.{name}").run(plan)
            reports.append(attrs.evolve(report, seconds=time.monotonic() - begun))
            print_report(reports[-1], console)
    file = parsed.json or _RESULTS / time.strftime("%Y%m%d-%H%M%S.json")
    write_json(reports, file)
    console.print(f"\nresults: {file}", markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
