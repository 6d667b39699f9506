"""The contracts of metadata stores and of plugins, with a real API server."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modelexpress_core.contracts.metadata_store import MetadataStore
from modelexpress_core.testing import MetadataStoreContract, PluginContract
from mx_kubernetes._store import KubernetesStore

pytestmark = pytest.mark.xdist_group("kubernetes")


class TestKubernetesPlugin(PluginContract):
    distribution = "mx-kubernetes"
    sdks = ("kubernetes_asyncio", "aiohttp")
    first_party = True


class TestKubernetesStore(MetadataStoreContract):
    @pytest.fixture
    def open_store(self, new_store: Callable[..., KubernetesStore]) -> Callable[[], MetadataStore]:
        return new_store
