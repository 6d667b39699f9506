"""The benchmarks run, and their results have the form that is promised. How fast anything is, is not asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from devtools import redis_server

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

#: Benchmark -> keys that each row of its table has.
NAMES = {
    "local": {"contender", "destination", "seconds", "GB/s", "of limit", "CPU-s/GB"},
    "s3": {"contender", "destination", "seconds", "GB/s", "of limit", "CPU-s/GB"},
    "gcs": {"contender", "destination", "seconds", "GB/s", "of limit", "CPU-s/GB"},
    "azure": {"contender", "destination", "seconds", "GB/s", "of limit", "CPU-s/GB"},
    "concurrency": {"latency ms", "cap MB/s", "destination", "best fixed", "of best"},
    "recording": {"what", "us a tensor", "seconds"},
    "memory": {"what", "destination", "peak over it MiB"},
    "faults": {"failing", "loads", "right", "fetched twice"},
    "corruption": {"digest", "corruptions", "repaired", "failed", "wrong"},
    "control_plane": {"what", "store", "workers", "wrong"},
    "streaming": {"contender", "destination", "seconds", "GB/s", "of limit", "CPU-s/GB"},
    "errors": {"store", "failure", "error", "score", "seconds", "doctor", "runai score"},
}

Rows = Sequence[Mapping[str, Any]]


def _moved_the_same_bytes(rows: Rows) -> bool:
    """Every contender loaded all of one checkpoint, ours among them: rate times time is the same, but for rounding."""
    least = [(row["GB/s"] - 0.0005) * (row["seconds"] - 0.00005) for row in rows]
    most = [(row["GB/s"] + 0.0005) * (row["seconds"] + 0.00005) for row in rows]
    ours = any(row["contender"].startswith("modelexpress") for row in rows)
    return ours and 0 < max(least) <= min(most)


def _each_positive(*keys: str) -> Callable[[Rows], bool]:
    return lambda rows: all(row[key] > 0 for row in rows for key in keys)


#: Benchmark -> what has to hold of its rows, however small the sizes are.
CORRECT: dict[str, Callable[[Rows], bool]] = {
    "local": _moved_the_same_bytes,
    "s3": _moved_the_same_bytes,
    "gcs": _moved_the_same_bytes,
    "azure": _moved_the_same_bytes,
    "streaming": _moved_the_same_bytes,
    "concurrency": _each_positive("best fixed", "of best"),
    "recording": _each_positive("us a tensor", "seconds"),
    "memory": lambda rows: all(row["peak over it MiB"] >= 0 for row in rows),
    "faults": lambda rows: all(0 < row["loads"] == row["right"] for row in rows),
    "corruption": lambda rows: all(0 == row["wrong"] for row in rows) and 0 < sum(row["corruptions"] for row in rows),
    "errors": lambda rows: all(5 == row["score"] for row in rows),
    "control_plane": lambda rows: all(0 == row["wrong"] for row in rows) and 0 < max(row["workers"] for row in rows),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_and_reports(name: str, scratch: Path) -> None:
    """In small sizes: rows, targets with a verdict, what is absent and why, and the rig, as tables and as JSON."""
    if name == "control_plane":
        redis_server.binary()  # without it, this test is skipped
    results = scratch / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--json", str(results), "--scratch", str(scratch)]

    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=550, check=False
    )

    assert done.returncode == 0, done.stderr
    (report,) = json.loads(results.read_text())["reports"]
    assert (name, True) == (report["benchmark"], report["quick"])
    assert report["rig"]
    assert report["rows"]
    assert all(NAMES[name] <= row.keys() for row in report["rows"])
    assert report["targets"]
    assert any(target["figure"] is not None for target in report["targets"])
    assert all(absent["reason"] for absent in report["absent"])
    assert "small sizes: not a measurement" in done.stdout
    assert name in done.stdout
    assert CORRECT[name](report["rows"]), report["rows"]


def test_a_benchmark_that_is_not_there_is_named() -> None:
    """With those that are."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "remote"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "unknown benchmarks: remote; available are local, s3" in done.stderr
