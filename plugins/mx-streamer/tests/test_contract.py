"""The plugin keeps to the contracts, on files and on a real S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from devtools.seaweedfs import SeaweedFS
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.testing import PluginContract, StorageContract
from tests.support.network import CLOSED_PORT


class TestStreamedFiles(StorageContract):
    root_is_listable = False  # it is the root directory of this machine

    @pytest.fixture
    def storage(self, opened: Callable[..., Any]) -> Any:
        return opened("file:///")

    @pytest.fixture
    def directory(self, tmp_path: Path) -> str:
        return str(tmp_path / uuid4().hex)

    @pytest.fixture
    def put(self, tmp_path: Path) -> Callable[[str, bytes], object]:
        def put(path: str, content: bytes) -> None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            new = tmp_path / uuid4().hex
            new.write_bytes(content)
            new.replace(path)

        return put


class TestStreamedS3(StorageContract):
    """Pages of listings are those of the regular plugin, which has its own tests of them."""

    @pytest.fixture
    def storage(self, on_s3: Callable[..., Any]) -> Any:
        return on_s3()

    @pytest.fixture
    def put(self, put: Callable[[str, bytes], object]) -> Callable[[str, bytes], object]:
        return put

    @pytest.fixture
    def secrets(self, s3_server: SeaweedFS) -> list[str]:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        return [*(s3_server.environ()[name] for name in names), "not-the-secret"]

    @pytest.fixture
    def missing_authority(self, on_s3: Callable[..., Any]) -> Any:
        return on_s3("s3://no-such-bucket")

    @pytest.fixture
    def unreachable(self, on_s3: Callable[..., Any]) -> Any:
        return on_s3(AWS_ENDPOINT_URL=f"http://127.0.0.1:{CLOSED_PORT}")

    @pytest.fixture
    def denied(self, on_s3: Callable[..., Any]) -> Any:
        return on_s3(AWS_SECRET_ACCESS_KEY="not-the-secret")

    @pytest.fixture
    def without_credentials(self, on_s3: Callable[..., Any]) -> Any:
        return on_s3(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)

    @pytest.fixture
    def stalled(
        self, on_s3: Callable[..., Any], put: Callable[[str, bytes], object], s3_server: SeaweedFS
    ) -> Iterator[tuple[Any, str]]:
        put("contract/silent", bytes(1000))
        port = int(s3_server.endpoint.rpartition(":")[2])
        with TcpProxy("127.0.0.1", port, lambda _number, _head: Fault("stall")) as proxy:
            yield on_s3(AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}"), "contract/silent"


class TestStreamerPlugin(PluginContract):
    distribution = "mx-streamer"
    sdks = ("runai_model_streamer", "boto3", "google.auth", "azure.core", "numpy")
    example_uri = "file:///models/llama"
    first_party = True

    @pytest.fixture
    def readme(self) -> str:
        return (Path(__file__).parents[1] / "README.md").read_text()
