"""The plugin keeps to the contracts, against a real server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from devtools.azurite import Azurite
from devtools.tcp_proxy import Fault
from modelexpress_core.testing import PluginContract, StorageContract
from mx_azure._storage import AzureStorage
from tests.support.network import CLOSED_PORT

_OTHER_KEY = "bm90IHRoZSBrZXk="


class TestAzureStorage(StorageContract):
    page_size = 1000

    @pytest.fixture
    def storage(self, opened: Callable[..., AzureStorage]) -> AzureStorage:
        return opened()

    @pytest.fixture
    def put(self, put: Callable[[str, bytes], object]) -> Callable[[str, bytes], object]:
        return put

    @pytest.fixture
    def secrets(self, azurite: Azurite) -> list[str]:
        return [azurite.key, _OTHER_KEY]

    @pytest.fixture
    def missing_authority(self, opened: Callable[..., AzureStorage]) -> AzureStorage:
        return opened("az://no-such-container")

    @pytest.fixture
    def unreachable(self, azurite: Azurite, opened: Callable[..., AzureStorage]) -> AzureStorage:
        return opened(AZURE_STORAGE_ENDPOINT=f"http://127.0.0.1:{CLOSED_PORT}/{azurite.account}")

    @pytest.fixture
    def denied(self, opened: Callable[..., AzureStorage]) -> AzureStorage:
        return opened(AZURE_STORAGE_ACCOUNT_KEY=_OTHER_KEY)

    @pytest.fixture
    def without_credentials(self, azurite: Azurite, opened: Callable[..., AzureStorage]) -> AzureStorage:
        endpoint = azurite.endpoint.replace("http:", "https:")  # tokens are sent by https only
        return opened(AZURE_STORAGE_ACCOUNT_KEY=None, AZURE_STORAGE_ENDPOINT=endpoint)

    @pytest.fixture
    def stalled(self, proxied: Callable[..., Any], put: Callable[..., Any]) -> tuple[AzureStorage, str]:
        put("contract/silent", bytes(1000))
        storage, _ = proxied(lambda _number, _head: Fault("stall"), MX_AZURE_READ_TIMEOUT_SECONDS="60")
        return storage, "contract/silent"


class TestAccountStorage(TestAzureStorage):
    """The storage of a URI that names the account: each of its paths begins with the container."""

    root_is_listable = False  # a URI names a container, so that no load lists the account

    @pytest.fixture
    def storage(self, opened: Callable[..., AzureStorage]) -> AzureStorage:
        return opened("az://mxaccount.blob.core.windows.net/models")

    @pytest.fixture
    def put(self, put: Callable[[str, bytes], object]) -> Callable[[str, bytes], object]:
        return lambda path, content: put(path.removeprefix("models/"), content)

    @pytest.fixture
    def directory(self) -> str:
        return f"models/{StorageContract.directory.__wrapped__(self)}"  # type: ignore[attr-defined]


class TestAzurePlugin(PluginContract):
    distribution = "mx-azure"
    sdks = ("azure.core", "azure.identity", "msal", "certifi")
    example_uri = "az://container/model"
    example_settings: ClassVar[Mapping[str, str]] = {
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_STORAGE_ACCOUNT_KEY": "a2V5",
    }
    first_party = True

    @pytest.fixture
    def readme(self) -> str:
        return (Path(__file__).parents[1] / "README.md").read_text()
