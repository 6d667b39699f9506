"""What the tests of several packages share: a real S3 server, and an environment that knows nothing of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.seaweedfs import SeaweedFS

BUCKET = "models"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[SeaweedFS]:
    """SeaweedFS with the bucket ``models``; started at first use, stopped at the end."""
    with SeaweedFS(BUCKET) as server:
        yield server


@pytest.fixture
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What SDKs would find on this machine (they read the process's environment themselves) is out of the way."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "MX_", "MODEL_EXPRESS_", "RUNAI_", "REQUESTS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
