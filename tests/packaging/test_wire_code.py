"""The generated modules of the wire protocol are what the proto files say, and work with every protobuf allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import skip_without

_ROOT = Path(__file__).resolve().parents[2]

#: The compiler that the committed modules came from.
_COMPILER = "grpcio-tools==1.66.2"

_ROUND_TRIP = """
import google.protobuf
from modelexpress_core.wire.proto.modelexpress import api_pb2, health_pb2, p2p_pb2
identity = p2p_pb2.SourceIdentity(model_name="m", tensor_parallel_size=2, extra_parameters={"a": "b"})
request = p2p_pb2.ListSourcesRequest(identity=identity, status_filter=p2p_pb2.SOURCE_STATUS_READY, limit=0)
again = p2p_pb2.ListSourcesRequest.FromString(request.SerializeToString())
assert request == again and again.HasField("limit") and not again.HasField("worker_rank_filter")
print(google.protobuf.__version__)
"""


def _installed(python: str, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        skip_without(f"a package index that has {' '.join(arguments)}: {done.stderr[-500:]}")


@pytest.mark.timeout(600)
def test_they_are_what_the_proto_files_say(tmp_path: Path) -> None:
    """Generating them anew changes nothing."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    _installed(python, _COMPILER, "setuptools<81")

    done = subprocess.run(
        [python, "-m", "devtools.wire_code", "--check"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", ["5.27.5", "6.33.6", "7.36.2"])
def test_they_work_with_every_protobuf_that_is_allowed(version: str, tmp_path: Path) -> None:
    """Without a warning; the first version that is allowed, and one of each later line."""
    _installed(sys.executable, "--target", str(tmp_path), "--no-deps", f"protobuf=={version}")

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _ROUND_TRIP],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(_ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert f"{version}\n" == done.stdout
