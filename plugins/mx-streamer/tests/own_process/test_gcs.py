"""The engine reads from GCS: the contract of storages, whole checkpoints, and what is said when a read fails."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from devtools.fake_gcs import FakeGcs
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.contracts.storage import ReadRequest
from modelexpress_core.errors import (
    NotFoundError,
    SettingsError,
    SourceChangedError,
    UnsupportedError,
)
from modelexpress_core.testing import StorageContract
from tests.support.network import CLOSED_PORT


class TestStreamedGcs(StorageContract):
    """Pages of listings are those of the regular plugin, which has its own tests of them.

    The engine sends no credentials to an emulator, so that none can be refused.
    """

    @pytest.fixture
    def storage(self, on_gcs: Callable[..., Any]) -> Any:
        return on_gcs()

    @pytest.fixture
    def put(self, gcs_server: FakeGcs) -> Callable[[str, bytes], object]:
        return gcs_server.put

    @pytest.fixture
    def missing_authority(self, on_gcs: Callable[..., Any]) -> Any:
        return on_gcs("gs://no-such-bucket")

    @pytest.fixture
    def unreachable(self, on_gcs: Callable[..., Any]) -> Any:
        url = f"http://127.0.0.1:{CLOSED_PORT}"
        return on_gcs(STORAGE_EMULATOR_HOST=url, CLOUD_STORAGE_EMULATOR_ENDPOINT=url)

    @pytest.fixture
    def stalled(self, on_gcs: Callable[..., Any], gcs_server: FakeGcs) -> Iterator[tuple[Any, str]]:
        gcs_server.put("contract/silent", bytes(1000))
        with TcpProxy("127.0.0.1", gcs_server.port, lambda _number, _head: Fault("stall")) as proxy:
            url = f"http://127.0.0.1:{proxy.port}"
            yield on_gcs(STORAGE_EMULATOR_HOST=url, CLOUD_STORAGE_EMULATOR_ENDPOINT=url), "contract/silent"


@pytest.mark.parametrize("staging", ["0", "1"])
def test_a_checkpoint_arrives_and_is_verified(
    load_all: Callable[..., Any], gcs_server: FakeGcs, gcs_environ: dict[str, str], staging: str
) -> None:
    """Every tensor, straight into place and through staging buffers, with versions and digests compared."""
    report = load_all(gcs_server.upload, gcs_environ, MX_FORCE_STAGING=staging, MX_CHUNK_BYTES="65536")

    assert "mx-streamer" == report.storage["plugin"]
    assert {"versions": 3, "sizes": 3, "digests": 3} == report.verified
    assert report.bytes_needed == report.bytes_fetched
    assert 0 == report.bytes_reread


def test_the_regular_plugin_explains_failures(
    on_gcs: Callable[..., Any], gcs_server: FakeGcs, failure: Callable[..., Any]
) -> None:
    """Its class, its cause and its next step, with the operation and the object of the engine's request."""
    gcs_server.put("explained/object", bytes(100))
    storage = on_gcs()
    version = storage.stat("explained/object").version
    gcs_server.put("explained/object", bytes(101))

    missing = failure(storage, "explained/none")
    changed = failure(storage, "explained/object", version)
    short = failure(storage, "explained/object", None, 200)

    assert [NotFoundError, SourceChangedError, SourceChangedError] == [type(e) for e in (missing, changed, short)]
    assert "gs://models/explained/none" == missing.uri
    assert "it has 101 bytes" in str(short)
    assert all(error.hint for error in (missing, changed, short))


def test_another_kind_of_store_is_refused(on_gcs: Callable[..., Any], opened: Callable[..., Any]) -> None:
    """The native library would look for its objects in the store that it read first."""
    storage = on_gcs()
    list(storage.read_batch([ReadRequest("explained/object", 0, memoryview(bytearray(10)))]))

    with pytest.raises(UnsupportedError, match="runai_model_streamer_gcs") as caught:
        opened("s3://models", AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_REGION="us-east-1")

    assert "MX_PREFER" in str(caught.value)


def test_objects_that_gcs_would_unpack_are_refused(
    on_gcs: Callable[..., Any], gcs_server: FakeGcs, failure: Callable[..., Any]
) -> None:
    """The engine would read unpacked bytes, at other offsets; the regular plugin says what to do."""
    gcs_server.put("explained/packed", gzip.compress(bytes(1000)), contentEncoding="gzip")

    error = failure(on_gcs(), "explained/packed")

    assert isinstance(error, UnsupportedError)
    assert "gzip" in str(error)


def test_an_emulator_that_the_engine_does_not_know_is_refused(on_gcs: Callable[..., Any]) -> None:
    """Before a byte moves; else the engine would look for the objects in the cloud."""
    with pytest.raises(SettingsError, match="CLOUD_STORAGE_EMULATOR_ENDPOINT"):
        on_gcs(CLOUD_STORAGE_EMULATOR_ENDPOINT=None)
