"""The plugin fulfils the contracts of ModelExpress."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from mx_hello._storage import HelloStorage
from web_server import WebServer

from modelexpress_core.testing import PluginContract, StorageContract


class TestHelloStorage(StorageContract):
    @pytest.fixture
    def server(self) -> Iterator[WebServer]:
        with WebServer() as server:
            yield server

    @pytest.fixture
    def storage(self, server: WebServer) -> Iterator[HelloStorage]:
        with closing(HelloStorage(server.authority)) as storage:
            yield storage

    @pytest.fixture
    def put(self, server: WebServer) -> Callable[[str, bytes], object]:
        return server.put

    @pytest.fixture
    def stalled(self, storage: HelloStorage) -> tuple[HelloStorage, str]:
        return storage, "silent"  # the server sends no byte of this file

    @pytest.fixture
    def unreachable(self) -> HelloStorage:
        with socket.create_server(("127.0.0.1", 0)) as free:
            return HelloStorage(f"127.0.0.1:{free.getsockname()[1]}")


class TestHelloPlugin(PluginContract):
    distribution = "mx-hello"
    example_uri = "hello://127.0.0.1:8080/model"
