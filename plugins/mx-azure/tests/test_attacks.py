"""Servers in the place of Azure, and of what gives tokens, that dawdle or never end: errors within bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from modelexpress_core.uri import ModelURI
from mx_azure._storage import AzureStorage, open_azure
from tests.support.http_attacks import READ_TIMEOUT_SECONDS, HttpAttacks

_READ_TIMEOUT = {"MX_AZURE_READ_TIMEOUT_SECONDS": str(READ_TIMEOUT_SECONDS)}


@pytest.fixture
def opened_without_server() -> Iterator[Callable[..., AzureStorage]]:
    """Opens storages with the given variables."""
    with contextlib.ExitStack() as stack:

        def opened_without_server(**variables: str) -> AzureStorage:
            settings = {"AZURE_STORAGE_ACCOUNT_NAME": "models1", **variables}
            return stack.enter_context(contextlib.closing(open_azure(ModelURI.parse("az://models"), settings)))

        yield opened_without_server


class TestAttacks(HttpAttacks):
    """By all that it inherits."""

    timeout_variable = "MX_AZURE_READ_TIMEOUT_SECONDS"
    listing = (b"<EnumerationResults><Blobs>", b"<Blob><Name>model/a</Name></Blob>")

    @pytest.fixture
    def open_at(self, opened_without_server: Callable[..., AzureStorage]) -> Callable[[str], AzureStorage]:
        """By the endpoint."""
        return lambda url: opened_without_server(
            AZURE_STORAGE_ACCOUNT_KEY="a2V5", AZURE_STORAGE_ENDPOINT=f"{url}/models1", **_READ_TIMEOUT
        )

    @pytest.fixture
    def open_with_credentials_from(
        self, opened_without_server: Callable[..., AzureStorage], monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[str], AzureStorage]:
        """From the metadata service."""

        def open_with_credentials_from(url: str) -> AzureStorage:
            monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", url)
            return opened_without_server(**_READ_TIMEOUT)

        return open_with_credentials_from
