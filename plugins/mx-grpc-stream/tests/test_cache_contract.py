"""The storage of ``mx`` keeps to the contract of all storages, against a server whose cache reads a disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import pytest

from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.errors import BackendError
from modelexpress_core.server.app import Server
from modelexpress_core.server.cache import cache
from modelexpress_core.sources.cache_client import CacheClient
from modelexpress_core.testing import StorageContract
from modelexpress_core.uri import ModelURI
from mx_grpc_stream._storage import CacheStorage, open_cache
from tests.support.caching import serving_cache
from tests.support.network import CLOSED_PORT

pytestmark = pytest.mark.slow

_TOKEN = "secret-of-the-reader"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models are that the server reads."""
    return tmp_path_factory.mktemp("source")


@pytest.fixture(scope="module")
def server(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that looks for a new version each time."""
    with (
        pytest.MonkeyPatch.context() as patch,
        serving_cache(tmp_path_factory.mktemp("cache"), (f"file://{source}",), {}) as server,
    ):
        patch.setattr(cache, "_RESOLVED_SECONDS", 0.0)  # each `put` is seen at once
        yield server


class _CacheContract(StorageContract, contract=True):
    """A storage stays with the version that it opened, so ``put`` lets it look again, as a new load would."""

    root_is_listable = False  # the root has models, and no files
    known_gaps: ClassVar[Mapping[str, str]] = {
        "test_reads_the_object_that_was_asked_for": "no cache has names that differ only in case: not every disk has"
    }
    environ: ClassVar[Mapping[str, str]] = {}

    @pytest.fixture
    def opened(self, source: Path) -> Iterator[Callable[..., CacheStorage]]:
        """Opens storages of the model that this test writes."""
        with contextlib.ExitStack() as closing:

            def opened(port: int, **environ: str) -> CacheStorage:
                uri = ModelURI.parse(f"mx://127.0.0.1:{port}/file{source}/model")
                return closing.enter_context(contextlib.closing(open_cache(uri, {**self.environ, **environ})))

            yield opened
        shutil.rmtree(source / "model", ignore_errors=True)

    @pytest.fixture
    def storage(self, server: Server, opened: Callable[..., CacheStorage], source: Path) -> CacheStorage:
        (source / "model").mkdir()
        (source / "model" / "config.json").write_text("{}")  # an empty directory is no model
        return opened(server.port)

    @pytest.fixture
    def put(self, storage: CacheStorage, source: Path) -> Callable[[str, bytes], object]:
        start = f"file{source}".strip("/") + "/"

        def put(path: str, content: bytes) -> None:
            target = source / path.removeprefix(start)
            target.parent.mkdir(parents=True, exist_ok=True)
            written = target.with_name(f".{uuid4().hex}")
            written.write_bytes(content)
            written.rename(target)
            storage.resolve_again()

        return put

    @pytest.fixture
    def directory(self, source: Path) -> str:
        return f"file{source}/model/contract-{uuid4().hex}"

    @pytest.fixture
    def secrets(self) -> list[str]:
        return [_TOKEN]

    @pytest.fixture
    def missing_authority(self, server: Server, source: Path) -> Iterator[CacheStorage]:
        uri = ModelURI.parse(f"mx://127.0.0.1:{server.port}/file{source}/nothing")
        with contextlib.closing(open_cache(uri, self.environ)) as storage:
            storage.list = lambda _prefix: CacheStorage.list(storage, f"file{source}/nothing")  # type: ignore[method-assign]
            yield storage

    @pytest.fixture
    def unreachable(self, opened: Callable[..., CacheStorage]) -> CacheStorage:
        return opened(CLOSED_PORT)

    @pytest.fixture
    def stalled(
        self, server: Server, opened: Callable[..., CacheStorage], storage: CacheStorage, source: Path
    ) -> Iterator[tuple[CacheStorage, str]]:
        (source / "model" / "silent").write_bytes(bytes(1000))
        storage.resolve_again()
        port = server.bulk_port
        policy = lambda _number, head: Fault("stall") if b"silent" in head else None  # noqa: E731
        with (
            TcpProxy("127.0.0.1", server.port, policy, listen="127.0.0.3") as proxy,
            TcpProxy("127.0.0.1", port, policy, listen="127.0.0.3", listen_port=port),
        ):
            uri = ModelURI.parse(f"mx://127.0.0.3:{proxy.port}/file{source}/model")
            with contextlib.closing(open_cache(uri, {**self.environ, "MX_VERIFY_DIGESTS": "0"})) as stalled:
                with CacheClient.from_env(f"127.0.0.1:{server.port}", {}) as client:
                    client.follow(client.open(uri.path))
                assert list(stalled.list(uri.path))
                yield stalled, f"{uri.path}/silent"

    def test_objects_of_one_name_are_told_apart(
        self, storage: CacheStorage, put: Callable[[str, bytes], object], directory: str
    ) -> None:
        """Those in different directories; a model with names that differ only in case is refused, with the reason."""
        contents = {f"{directory}/{name}": name.encode() * 1000 for name in ("a/x", "b/x", "x")}
        for path, content in contents.items():
            put(path, content)

        for path in (*contents, *reversed(contents)):
            buffer = bytearray(len(contents[path]))
            assert len(buffer) == storage.read_into(path, 0, memoryview(buffer), version=storage.stat(path).version)
            assert contents[path] == buffer
        put(f"{directory}/A/x", b"x")
        with pytest.raises(BackendError, match="differ only in case"):
            storage.stat(f"{directory}/A/x")


class TestCacheStorage(_CacheContract):
    """Over the bulk channel."""


class TestCacheStorageInFrames(_CacheContract):
    """Over gRPC alone."""

    environ: ClassVar[Mapping[str, str]] = {"MX_BULK_PORT": "0"}
