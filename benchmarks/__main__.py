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

#: In the order in which they are run where none is named.
BENCHMARKS = ("local", "s3", "concurrency", "recording", "memory", "faults", "corruption", "control_plane")
#: Only where they are named: they take long, and need more.
_NAMED = ("vllm",)

_RESULTS = Path(__file__).parent / "results"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Figures as ratios, each from one run.")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"what to run: {', '.join(BENCHMARKS)}; all of these by default; or {', '.join(_NAMED)}",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, and measures little")
    parser.add_argument("--rounds", type=int, help="turns of each contender; 5 by default, 1 with --quick")
    parser.add_argument("--json", type=Path, help="file for the results; one below benchmarks/results by default")
    parser.add_argument("--scratch", type=Path, help="directory for what is generated; kept, and used again next time")
    parsed = parser.parse_args(arguments)
    unknown = sorted(set(parsed.names) - {*BENCHMARKS, *_NAMED})
    if unknown:
        parser.error(f"no benchmark is named {', '.join(unknown)}; there are {', '.join(BENCHMARKS + _NAMED)}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; the exit code is 0 whether or not targets are met: figures are for people to judge."""
    parsed = _arguments(arguments)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    for name in list(os.environ):
        if name.startswith(("AWS_", "MX_", "RUNAI_")):
            del os.environ[name]  # the benchmarks say what holds
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
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
