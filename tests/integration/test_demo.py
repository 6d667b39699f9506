"""The second half of ``make demo``: real workers that read a small model from each other. Once, since it starts five
processes."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from devtools.demo_peers import show_peers
from devtools.seaweedfs import SeaweedFS


@pytest.mark.slow
def test_workers_read_from_each_other(s3_server: SeaweedFS, tmp_path: Path) -> None:
    """Worker A from the bucket, the others from A over each transport, and every tensor is equal."""
    tensors = {"weight": torch.randn(300, 40).to(torch.bfloat16), "counts": torch.arange(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    uri = s3_server.upload(tmp_path, "models", "demo-peers")
    written = io.StringIO()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MX_"))}

    failures = show_peers(Console(file=written, width=160), uri, tensors, {**environ, **s3_server.environ()})

    shown = written.getvalue()
    assert 0 == failures, shown
    rows = [line.split() for line in shown.splitlines() if " all 2" in line]
    assert ["A", "the", "bucket", "s3://"] == rows[0][:4], shown
    assert "grpc://" == rows[-1][2], shown
    assert {"A"} == {row[1] for row in rows[1:]}
