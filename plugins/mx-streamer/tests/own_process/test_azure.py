"""The engine reads from Azure by https: the contract of storages, whole checkpoints, and failures of reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from devtools.azurite import Azurite
from devtools.http_proxy import HttpProxy
from modelexpress_core.contracts.storage import ReadRequest
from modelexpress_core.errors import (
    InvalidURIError,
    NotFoundError,
    SourceChangedError,
    UnsupportedError,
)
from modelexpress_core.testing import StorageContract
from tests.support.network import CLOSED_PORT

_OTHER_KEY = "bm90IHRoZSBrZXk="


class TestStreamedAzure(StorageContract):
    """Pages of listings, and reads that stall, are those of the regular plugin, which has its own tests of them."""

    @pytest.fixture
    def storage(self, on_azure: Callable[..., Any]) -> Any:
        return on_azure()

    @pytest.fixture
    def put(self, put_blob: Callable[[str, bytes], object]) -> Callable[[str, bytes], object]:
        return put_blob

    @pytest.fixture
    def secrets(self, azure_environ: dict[str, str]) -> list[str]:
        return [azure_environ["AZURE_STORAGE_ACCOUNT_KEY"], _OTHER_KEY]

    @pytest.fixture
    def missing_authority(self, on_azure: Callable[..., Any]) -> Any:
        return on_azure("az://no-such-container")

    @pytest.fixture
    def unreachable(self, on_azure: Callable[..., Any]) -> Any:
        return on_azure(HTTPS_PROXY=f"http://127.0.0.1:{CLOSED_PORT}")

    @pytest.fixture
    def denied(self, on_azure: Callable[..., Any]) -> Any:
        return on_azure(AZURE_STORAGE_ACCOUNT_KEY=_OTHER_KEY)

    @pytest.fixture
    def without_credentials(self, on_azure: Callable[..., Any]) -> Any:
        return on_azure(AZURE_STORAGE_ACCOUNT_KEY=None)


@pytest.mark.parametrize("staging", ["0", "1"])
def test_a_checkpoint_arrives_and_is_verified(
    load_all: Callable[..., Any],
    secure_azurite: tuple[Azurite, HttpProxy],
    azure_environ: dict[str, str],
    staging: str,
) -> None:
    """Every tensor, straight into place and through staging buffers, with versions and digests compared."""
    report = load_all(secure_azurite[0].upload, azure_environ, MX_FORCE_STAGING=staging, MX_CHUNK_BYTES="65536")

    assert "mx-streamer" == report.storage["plugin"]
    assert {"versions": 3, "sizes": 3, "digests": 3} == report.verified
    assert report.bytes_needed == report.bytes_fetched
    assert 0 == report.bytes_reread


def test_the_regular_plugin_explains_failures(
    on_azure: Callable[..., Any], put_blob: Callable[..., Any], failure: Callable[..., Any]
) -> None:
    """The engine calls a read over the end of a blob a success, and the plugin does not."""
    put_blob("explained/object", bytes(100))
    storage = on_azure()
    version = storage.stat("explained/object").version
    put_blob("explained/object", bytes(101))

    missing = failure(storage, "explained/none")
    changed = failure(storage, "explained/object", version)
    short = failure(storage, "explained/object", None, 200)

    assert [NotFoundError, SourceChangedError, SourceChangedError] == [type(e) for e in (missing, changed, short)]
    assert "az://models/explained/none" == missing.uri
    assert "it has 101 bytes" in str(short)
    assert all(error.hint for error in (missing, changed, short))


def test_another_kind_of_store_is_refused(on_azure: Callable[..., Any], opened: Callable[..., Any]) -> None:
    """The native library would look for its objects in the store that it read first."""
    storage = on_azure()
    list(storage.read_batch([ReadRequest("explained/object", 0, memoryview(bytearray(10)))]))

    with pytest.raises(UnsupportedError, match="runai_model_streamer_azure") as caught:
        opened("s3://models", AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_REGION="us-east-1")

    assert "MX_PREFER" in str(caught.value)


def test_a_sas_token_suffices(
    on_azure: Callable[..., Any], put_blob: Callable[..., Any], secure_azurite: tuple[Azurite, HttpProxy]
) -> None:
    """In place of the account's key, for the regular plugin and for the engine."""
    put_blob("explained/object", b"content")
    storage = on_azure(AZURE_STORAGE_ACCOUNT_KEY=None, AZURE_STORAGE_SAS_TOKEN=secure_azurite[0].sas())
    memory = bytearray(7)

    (completion,) = storage.read_batch([ReadRequest("explained/object", 0, memoryview(memory))])

    assert (None, b"content") == (completion.error, bytes(memory))


def test_uris_that_name_an_account_are_refused(on_azure: Callable[..., Any]) -> None:
    """The engine would take the host for a container."""
    with pytest.raises(InvalidURIError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        on_azure("az://mxaccount.blob.core.windows.net/models")
