"""Core without any extra: what loads of files need is installed with it, and nothing else is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from devtools.models import generate_sharded

#: Top-level packages that only extras install.
_OF_EXTRAS = ("blake3", "boto3", "google.protobuf", "grpc", "hypothesis", "prometheus_client", "redis", "yaml")

_PROGRAM = f"""
import sys
for name in {_OF_EXTRAS!r}:
    sys.modules[name] = None  # an import of it fails
import modelexpress_core as mx
from modelexpress_core.cli.app import build_app
build_app()
assert mx.load_state_dict(sys.argv[1])
assert mx.open_checkpoint(sys.argv[1]).tensors
from modelexpress_core.doctor import can_load, diagnose
assert can_load(diagnose(sys.argv[1]))
mx.pull(sys.argv[1], sys.argv[2])
print("done")
"""


def test_files_are_loaded_without_any_extra(tmp_path: Path) -> None:
    """Loads, pulls, diagnoses and the command line."""
    model = generate_sharded(tmp_path / "model", shards=2, layers=1, hidden=64)

    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(model), str(tmp_path / "copy")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )

    assert (0, "done") == (done.returncode, done.stdout.strip()), done.stderr
