"""The plugin keeps to the contracts, against an emulator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devtools.tcp_proxy import Fault
from modelexpress_core.testing import PluginContract, StorageContract
from mx_gcs._storage import GcsStorage
from tests.support.network import CLOSED_PORT


class TestGcsStorage(StorageContract):
    page_size = 1000

    @pytest.fixture
    def storage(self, emulated: Callable[..., GcsStorage]) -> GcsStorage:
        return emulated()

    @pytest.fixture
    def put(self, put: Callable[[str, bytes], object]) -> Callable[[str, bytes], object]:
        return put

    @pytest.fixture
    def secrets(self, google: Any) -> list[str]:
        return [google.private_key, google.refresh_token, google.client_secret, "ya29."]

    @pytest.fixture
    def missing_authority(self, emulated: Callable[..., GcsStorage]) -> GcsStorage:
        return emulated("gs://no-such-bucket")

    @pytest.fixture
    def unreachable(self, opened: Callable[..., GcsStorage]) -> GcsStorage:
        return opened(STORAGE_EMULATOR_HOST=f"127.0.0.1:{CLOSED_PORT}")

    @pytest.fixture
    def denied(
        self, google: Any, variables: Callable[[str], dict[str, str]], opened: Callable[..., GcsStorage]
    ) -> GcsStorage:
        google.rights = frozenset()
        return opened(**variables("key"))

    @pytest.fixture
    def without_credentials(self, google: Any, opened: Callable[..., GcsStorage]) -> GcsStorage:
        return opened(MX_GCS_ENDPOINT=google.url)

    @pytest.fixture
    def stalled(self, proxied: Callable[..., Any], put: Callable[..., str]) -> tuple[GcsStorage, str]:
        put("contract/silent", bytes(1000))
        storage, _ = proxied(lambda _number, _head: Fault("stall"), MX_GCS_READ_TIMEOUT_SECONDS="60")
        return storage, "contract/silent"


class TestGcsPlugin(PluginContract):
    distribution = "mx-gcs"
    sdks = ("google.auth", "google.oauth2")
    example_uri = "gs://bucket/model"
    first_party = True

    @pytest.fixture
    def readme(self) -> str:
        return (Path(__file__).parents[1] / "README.md").read_text()
