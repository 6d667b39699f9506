"""A real Blob service for all tests, a proxy before it that misbehaves, and servers that follow a script."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from devtools.azurite import Azurite
from devtools.tcp_proxy import Policy, TcpProxy
from modelexpress_core.uri import ModelURI
from mx_azure._storage import AzureStorage, open_azure
from tests.support.azure_tokens import ASSERTION, CLIENT, CONTENT, TENANT, TokenServices
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


# -- tokens, on the real server by https -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    files = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(files / "ca.pem"))
    return authority, files


@pytest.fixture(scope="session")
def secure(authority: tuple[trustme.CA, Path]) -> Iterator[Azurite]:
    """The real server by https, which accepts tokens."""
    issuer, files = authority
    certificate = issuer.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(str(files / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(files / "cert.pem"))
    with Azurite("models", certificate=(files / "cert.pem", files / "key.pem"), ca_bundle=files / "ca.pem") as server:
        with contextlib.closing(server.client()) as client:
            client.get_blob_client("models", "object").upload_blob(CONTENT)
        yield server


@pytest.fixture
def services(authority: tuple[trustme.CA, Path]) -> Iterator[TokenServices]:
    services = TokenServices()
    services.gate.set()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority[0].issue_cert("127.0.0.1").configure_cert(context)
    with serving(services.answer, context) as port, serving(services.answer) as plain:
        services.host = f"127.0.0.1:{port}"
        services.machine = f"http://127.0.0.1:{plain}"
        yield services


@pytest.fixture
def with_tokens(secure: Azurite, services: TokenServices) -> Iterator[Callable[..., AzureStorage]]:
    """Opens storages on the real server, with an identity in place of the account's key."""
    with contextlib.ExitStack() as stack:

        def with_tokens(**variables: str | None) -> AzureStorage:
            environ = {
                **secure.environ(),
                "AZURE_STORAGE_ACCOUNT_KEY": None,
                "AZURE_TENANT_ID": TENANT,
                "AZURE_CLIENT_ID": CLIENT,
                "AZURE_AUTHORITY_HOST": services.host,
                **variables,
            }
            settings = {name: value for name, value in environ.items() if value is not None}
            return stack.enter_context(contextlib.closing(open_azure(ModelURI.parse("az://models"), settings)))

        yield with_tokens


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(ASSERTION)
    return path
