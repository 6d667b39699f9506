"""Metadata in this process keeps to the contract of metadata stores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modelexpress_core.contracts.metadata_store import MetadataStore
from modelexpress_core.server.stores.memory import MemoryStore
from modelexpress_core.testing import MetadataStoreContract


class TestMemoryStore(MetadataStoreContract):
    @pytest.fixture
    def open_store(self) -> Callable[[], MetadataStore]:
        return MemoryStore
