"""What the benchmark of vLLM says where there is no vLLM. With one it takes a quarter of an hour, however small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_an_environment_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With the command that makes one, and before anything is generated."""
    nowhere, scratch = tmp_path / "nowhere", tmp_path / "scratch"

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "vllm", "--quick", "--scratch", str(scratch)],
        cwd=ROOT,
        env={**os.environ, "VLLM_VENV": str(nowhere)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert str(nowhere) in done.stderr
    assert "make bench-vllm" in done.stderr
    assert not list(scratch.iterdir())
