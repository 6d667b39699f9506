"""The engine reads from GCS and Azure: the tests in ``own_process``, one process for each of the two stores.

A process can read from one kind of object store with the native library, and the other tests read from S3.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from devtools.packages import ROOT
from tests.support.tools import MISSING_TOOL, skip_without


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("store", ["gcs", "azure"])
def test_the_engine_reads_from_other_stores(store: str, pytestconfig: pytest.Config) -> None:
    """All tests of the store pass."""
    tests = Path(__file__).with_name("own_process") / f"test_{store}.py"
    strict = ["--require-tools"] if pytestconfig.getoption("require_tools") else []
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:xdist", *strict, str(tests)],
        cwd=ROOT,
        env={**environ, "TESTS_IN_OWN_PROCESS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )

    missing = re.search(f"{re.escape(MISSING_TOOL)}(.*)", done.stdout)
    if missing and not done.returncode:
        skip_without(missing[1])
    assert 0 == done.returncode, done.stdout[-6000:] + done.stderr[-2000:]
