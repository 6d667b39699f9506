"""The plugin keeps to the contracts, against a stand-in for the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from devtools.fake_hub import FakeHub
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.testing import PluginContract, StorageContract
from mx_hf._storage import HfStorage
from tests.support.network import CLOSED_PORT


class TestHfStorage(StorageContract):
    """A storage stays with the commit that it resolved, so ``put`` lets it look again, as a new load would.

    ``test_revisions.py`` tests that it does not without.
    """

    page_size = 100
    root_is_listable = False  # an organisation: it has repositories, and no files

    @pytest.fixture
    def storage(self, hub: FakeHub, on_hub: Callable[..., HfStorage]) -> HfStorage:
        hub.page_entries = 100
        return on_hub()

    @pytest.fixture
    def put(self, hub: FakeHub, storage: HfStorage) -> Callable[[str, bytes], object]:
        def put(path: str, content: bytes) -> None:
            name, _, inside = path.partition("/")
            hub.put(f"org/{name}", inside, content)
            storage.resolve_again()

        return put

    @pytest.fixture
    def directory(self) -> str:
        return f"model/contract-{uuid4().hex}"

    @pytest.fixture
    def secrets(self, hub: FakeHub) -> list[str]:
        return [*hub.tokens, "Signature="]

    @pytest.fixture
    def missing_authority(self, opened: Callable[..., HfStorage], hub: FakeHub) -> HfStorage:
        return opened("hf://nobody/model", **hub.environ())

    @pytest.fixture
    def unreachable(self, opened: Callable[..., HfStorage]) -> HfStorage:
        return opened(HF_ENDPOINT=f"http://127.0.0.1:{CLOSED_PORT}")

    @pytest.fixture
    def denied(self, on_hub: Callable[..., HfStorage]) -> HfStorage:
        return on_hub(HF_TOKEN="hf_aTokenThatTheHubDoesNotKnow")

    @pytest.fixture
    def stalled(self, hub: FakeHub, opened: Callable[..., HfStorage]) -> Iterator[tuple[HfStorage, str]]:
        hub.put("org/model", "silent", bytes(1000), lfs=False)
        policy = lambda _number, head: Fault("stall") if b"resolve-cache" in head and b"GET" in head else None  # noqa: E731
        with TcpProxy("127.0.0.1", hub.port, policy) as proxy:
            variables = {"HF_ENDPOINT": f"http://127.0.0.1:{proxy.port}", "MX_HF_READ_TIMEOUT_SECONDS": "60"}
            yield opened(**variables), "model/silent"


class TestHfPlugin(PluginContract):
    distribution = "mx-hf"
    sdks = ("huggingface_hub",)
    example_uri = "hf://org/model"
    first_party = True

    @pytest.fixture
    def readme(self) -> str:
        return (Path(__file__).parents[1] / "README.md").read_text()
