"""The storages and the transport that core brings keep to the contracts that it asks of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from modelexpress_core.contracts.storage import Storage
from modelexpress_core.plugin import mx_register_transports
from modelexpress_core.providers import TransportProvider
from modelexpress_core.storage.file import FileStorage
from modelexpress_core.storage.memory import MemoryStorage
from modelexpress_core.testing import FaultPolicy, FaultyStorage, PluginContract, StorageContract, TransportContract


def replacing(directory: Path) -> Callable[[str, bytes], object]:
    """What stores a file in one step, by way of ``directory``."""

    def put(path: str, content: bytes) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        new = directory / "new"
        new.write_bytes(content)
        new.replace(path)

    return put


class TestFileStorage(StorageContract):
    root_is_listable = False  # it is the root directory of this machine

    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        storage = FileStorage()
        yield storage
        storage.close()

    @pytest.fixture
    def directory(self, tmp_path: Path) -> str:
        return str(tmp_path / "files")

    @pytest.fixture
    def put(self, tmp_path: Path) -> Callable[[str, bytes], object]:
        return replacing(tmp_path)


class TestMemoryStorage(StorageContract):
    @pytest.fixture
    def storage(self) -> MemoryStorage:
        return MemoryStorage("contract")

    @pytest.fixture
    def put(self, storage: MemoryStorage) -> Callable[[str, bytes], object]:
        return storage.put


class TestStorageWithoutFaults(StorageContract):
    """A FaultyStorage with nothing to do changes nothing; a stall ends when it is closed."""

    @pytest.fixture
    def inner(self) -> MemoryStorage:
        return MemoryStorage("contract")

    @pytest.fixture
    def storage(self, inner: MemoryStorage) -> FaultyStorage:
        return FaultyStorage(inner, FaultPolicy())

    @pytest.fixture
    def put(self, inner: MemoryStorage) -> Callable[[str, bytes], object]:
        return inner.put

    @pytest.fixture
    def unreachable(self, inner: MemoryStorage) -> FaultyStorage:
        return FaultyStorage(inner, FaultPolicy(unavailable=1, operations=["list", "stat", "read_into"]))

    @pytest.fixture
    def stalled(self, inner: MemoryStorage) -> tuple[FaultyStorage, str]:
        inner.put("silent", bytes(1000))
        return FaultyStorage(inner, FaultPolicy(stall=1)), "silent"


class TestStorageWithRunsWithoutFaults(StorageContract):
    """A FaultyStorage reads runs where the storage in it does."""

    root_is_listable = False  # as above

    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        with closing(FaultyStorage(FileStorage(), FaultPolicy())) as storage:
            yield storage

    @pytest.fixture
    def directory(self, tmp_path: Path) -> str:
        return str(tmp_path / "files")

    @pytest.fixture
    def put(self, tmp_path: Path) -> Callable[[str, bytes], object]:
        return replacing(tmp_path)


@pytest.mark.slow
class TestInprocTransport(TransportContract):
    @pytest.fixture
    def provider(self) -> TransportProvider:
        (record,) = mx_register_transports()
        return record


class TestBuiltInPlugin(PluginContract):
    distribution = "modelexpress-core"
    example_uri = "memory://contract/model"

    @pytest.fixture
    def readme(self) -> str:
        root = Path(__file__).parents[2]  # the README sends whoever looks for a variable to the page on settings
        return (root / "README.md").read_text() + (root / "docs" / "settings.md").read_text()


class TestBuiltInPluginWithFiles(TestBuiltInPlugin):
    example_uri = "file:///model"
