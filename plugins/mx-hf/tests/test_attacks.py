"""Servers in the place of the Hub that dawdle or never end: errors within bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mx_hf._storage import HfStorage
from tests.support.http_attacks import READ_TIMEOUT_SECONDS, HttpAttacks

_READ_TIMEOUT = {"MX_HF_READ_TIMEOUT_SECONDS": str(READ_TIMEOUT_SECONDS)}
_COMMIT = b"1" * 40


class TestAttacks(HttpAttacks):
    """By all that it inherits: on the request for the commit, and on those for trees and contents."""

    timeout_variable = "MX_HF_READ_TIMEOUT_SECONDS"
    listing = (b"[", b'{"type": "file", "path": "a", "size": 1, "oid": "' + _COMMIT + b'"}, ')

    @pytest.fixture(params=["main", _COMMIT.decode()])
    def open_at(self, request: pytest.FixtureRequest, opened: Callable[..., HfStorage]) -> Callable[[str], HfStorage]:
        """With a branch, which is resolved first, or a commit."""
        uri = f"hf://org/model?revision={request.param}"
        return lambda url: opened(uri, HF_ENDPOINT=url, **_READ_TIMEOUT)

    @pytest.fixture
    def open_with_credentials_from(self) -> Callable[[str], HfStorage]:
        """No server gives this plugin tokens: huggingface_hub renews those of a login with its own requests."""
        pytest.skip("tokens come from a variable or a file")
