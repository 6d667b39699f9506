"""Servers in the place of GCS, and of what gives tokens, that dawdle or never end: errors within bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mx_gcs._storage import GcsStorage
from tests.support.http_attacks import READ_TIMEOUT_SECONDS, HttpAttacks

_READ_TIMEOUT = {"MX_GCS_READ_TIMEOUT_SECONDS": str(READ_TIMEOUT_SECONDS)}


class TestAttacks(HttpAttacks):
    """By all that it inherits."""

    timeout_variable = "MX_GCS_READ_TIMEOUT_SECONDS"
    listing = (b'{"items": [', b'{"name": "model/a"}, ')

    @pytest.fixture
    def open_at(self, opened: Callable[..., GcsStorage]) -> Callable[[str], GcsStorage]:
        """As an emulator."""
        return lambda url: opened(STORAGE_EMULATOR_HOST=url, **_READ_TIMEOUT)

    @pytest.fixture(params=["key", "metadata"])
    def open_with_credentials_from(
        self, request: pytest.FixtureRequest, opened: Callable[..., GcsStorage], google: Any, tmp_path: Path
    ) -> Callable[[str], GcsStorage]:
        """From the token service of a key's file, or from the metadata server."""

        def open_with_credentials_from(url: str) -> GcsStorage:
            place = {"GCE_METADATA_HOST": url.removeprefix("http://"), "NO_GCE_CHECK": "false"}
            if request.param == "key":
                file = tmp_path / "key.json"
                file.write_text(json.dumps({**google.key_file(), "token_uri": f"{url}/token"}))
                place = {"GOOGLE_APPLICATION_CREDENTIALS": str(file)}
            return opened(MX_GCS_ENDPOINT=google.url, **_READ_TIMEOUT, **place)

        return open_with_credentials_from
