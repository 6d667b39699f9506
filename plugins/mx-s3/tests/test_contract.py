"""The plugin keeps to the contracts, against a real server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Fault
from modelexpress_core.testing import PluginContract, StorageContract
from mx_s3._storage import S3Storage
from tests.support.network import CLOSED_PORT


class TestS3Storage(StorageContract):
    page_size = 1000

    @pytest.fixture
    def storage(self, opened: Callable[..., S3Storage]) -> S3Storage:
        return opened()

    @pytest.fixture
    def put(self, put: Callable[[str, bytes], object]) -> Callable[[str, bytes], object]:
        return put

    @pytest.fixture
    def secrets(self, server: SeaweedFS) -> list[str]:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        return [*(server.environ()[name] for name in names), "not-the-secret"]

    @pytest.fixture
    def missing_authority(self, opened: Callable[..., S3Storage]) -> S3Storage:
        return opened("s3://no-such-bucket")

    @pytest.fixture
    def unreachable(self, opened: Callable[..., S3Storage]) -> S3Storage:
        return opened(AWS_ENDPOINT_URL=f"http://127.0.0.1:{CLOSED_PORT}")

    @pytest.fixture
    def denied(self, opened: Callable[..., S3Storage]) -> S3Storage:
        return opened(AWS_SECRET_ACCESS_KEY="not-the-secret")

    @pytest.fixture
    def without_credentials(self, opened: Callable[..., S3Storage]) -> S3Storage:
        return opened(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)

    @pytest.fixture
    def stalled(self, proxied: Callable[..., Any], put: Callable[..., str]) -> tuple[S3Storage, str]:
        put("contract/silent", bytes(1000))
        storage, _ = proxied(lambda _number, _head: Fault("stall"), MX_S3_READ_TIMEOUT_SECONDS="60")
        return storage, "contract/silent"


class TestS3Plugin(PluginContract):
    distribution = "mx-s3"
    sdks = ("boto3", "botocore", "urllib3")
    example_uri = "s3://bucket/model"
    first_party = True

    @pytest.fixture
    def readme(self) -> str:
        return (Path(__file__).parents[1] / "README.md").read_text()
