"""A real Blob service for all tests, a proxy before it that misbehaves, and servers that follow a script."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from devtools.azurite import Azurite
from devtools.tcp_proxy import Policy, TcpProxy
from modelexpress_core.uri import ModelURI
from mx_azure._storage import AzureStorage, open_azure
from tests.support.scripted_http import Answer, Request, pass_on, serving

CONTAINER = "models"


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None) -> None:
    pass


@pytest.fixture(scope="session")
def client(azurite: Azurite) -> Iterator[Any]:
    with contextlib.closing(azurite.client()) as client:
        yield client


@pytest.fixture
def put(client: Any) -> Callable[..., Any]:
    """Stores a blob."""

    def put(name: str, content: bytes, container: str = CONTAINER, **options: Any) -> Any:
        return client.get_blob_client(container, name).upload_blob(content, overwrite=True, **options)

    return put


@pytest.fixture
def opened(azurite: Azurite) -> Iterator[Callable[..., AzureStorage]]:
    """Opens storages on the server; variables replace its own, None takes one away."""
    with contextlib.ExitStack() as stack:

        def opened(
            uri: str = f"az://{CONTAINER}",
            clock: Callable[[], float] = time.monotonic,
            now: Callable[[], float] = time.time,
            **variables: str | None,
        ) -> AzureStorage:
            environ = {**azurite.environ(), **variables}
            settings = {name: value for name, value in environ.items() if value is not None}
            storage = open_azure(ModelURI.parse(uri), settings, clock=clock, now=now)
            return stack.enter_context(contextlib.closing(storage))

        yield opened


@pytest.fixture
def proxied(azurite: Azurite, opened: Callable[..., AzureStorage]) -> Iterator[Callable[..., Any]]:
    """Opens storages that reach the server through a proxy with the given policy."""
    with contextlib.ExitStack() as stack:

        def proxied(policy: Policy | None = None, **options: Any) -> tuple[AzureStorage, TcpProxy]:
            proxy = stack.enter_context(TcpProxy("127.0.0.1", azurite.port, policy))
            endpoint = f"http://127.0.0.1:{proxy.port}/{azurite.account}"
            return opened(AZURE_STORAGE_ENDPOINT=endpoint, **options), proxy

        yield proxied


@pytest.fixture
def scripted(azurite: Azurite, opened: Callable[..., AzureStorage]) -> Iterator[Callable[..., AzureStorage]]:
    """Opens storages on a server that answers as a function says: for what the real one never does."""
    with contextlib.ExitStack() as stack:

        def scripted(answer: Callable[[Request], Answer | None] | Answer, **options: Any) -> AzureStorage:
            port = stack.enter_context(serving(answer if callable(answer) else lambda _: answer))
            options.setdefault("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{port}/{azurite.account}")
            storage = opened(**options)
            stack.callback(storage.close)
            return storage

        yield scripted


@pytest.fixture
def fronted(azurite: Azurite, scripted: Callable[..., AzureStorage]) -> Callable[..., AzureStorage]:
    """Opens storages on a server that answers as a function says, and passes on what that leaves to the real one."""

    def fronted(answer: Callable[[Request], Answer | None], **options: Any) -> AzureStorage:
        return scripted(lambda request: answer(request) or pass_on(request, azurite.port), **options)

    return fronted
