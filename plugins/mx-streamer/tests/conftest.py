"""Storages that read with the engine, and the environment that it reads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme
from safetensors.torch import load_file

import modelexpress_core as mx
from devtools.azurite import Azurite
from devtools.fake_gcs import FakeGcs
from devtools.http_proxy import HttpProxy
from devtools.missing import ToolMissingError
from devtools.models import generate_sharded
from devtools.seaweedfs import SeaweedFS
from modelexpress_core.contracts.storage import ReadRequest
from modelexpress_core.errors import BackendError
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.uri import ModelURI
from tests.support.trust import machine_trusts

BUCKET = "models"

#: ``test_own_process.py`` runs these.
collect_ignore = [] if os.environ.get("TESTS_IN_OWN_PROCESS") else ["own_process"]


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for store in ("s3", "gcs", "azure"):
        if find_spec(f"runai_model_streamer_{store}") is None:
            raise ToolMissingError(f"runai-model-streamer-{store}: its wheels need Linux with glibc 2.30")
    monkeypatch.setenv("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "0")


@pytest.fixture(scope="session")
def client(s3_server: SeaweedFS) -> Iterator[Any]:
    with contextlib.closing(s3_server.client()) as client:
        yield client


@pytest.fixture
def put(client: Any) -> Callable[..., str]:
    """Stores an object; its ETag comes back."""

    def put(key: str, body: bytes, **options: Any) -> str:
        return str(client.put_object(Bucket=BUCKET, Key=key, Body=body, **options)["ETag"])

    return put


@pytest.fixture
def gcs_environ(gcs_server: FakeGcs) -> dict[str, str]:
    """What the regular plugin and the engine need to know."""
    return {**gcs_server.environ(), "CLOUD_STORAGE_EMULATOR_ENDPOINT": gcs_server.endpoint}


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    """An authority, and the file that makes clients trust it."""
    authority, path = trustme.CA(), tmp_path_factory.mktemp("tls") / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return authority, path


@pytest.fixture(scope="session")
def secure_azurite(authority: tuple[trustme.CA, Path]) -> Iterator[tuple[Azurite, HttpProxy]]:
    """The Blob service by https, and the proxy that leads to it from its name in Azure: the engine takes no other."""
    issuer, path = authority
    certificate = issuer.issue_cert("127.0.0.1", f"{Azurite.account}.blob.core.windows.net")
    key, chain = path.with_name("key.pem"), path.with_name("chain.pem")
    certificate.private_key_pem.write_to_path(str(key))
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    with (
        Azurite(BUCKET, certificate=(chain, key), ca_bundle=path) as server,
        HttpProxy(route=lambda _host, _port: ("127.0.0.1", server.port)) as proxy,
    ):
        yield server, proxy


@pytest.fixture
def azure_environ(
    secure_azurite: tuple[Azurite, HttpProxy], authority: tuple[trustme.CA, Path]
) -> Iterator[dict[str, str]]:
    """What the regular plugin and the engine need to know. The engine trusts the authorities of the machine alone."""
    server, proxy = secure_azurite
    with machine_trusts(authority[1]):
        yield {
            "AZURE_STORAGE_ACCOUNT_NAME": server.account,
            "AZURE_STORAGE_ACCOUNT_KEY": server.key,
            "HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}",
            "MX_AZURE_CA_BUNDLE": str(authority[1]),
        }


@pytest.fixture
def put_blob(secure_azurite: tuple[Azurite, HttpProxy]) -> Iterator[Callable[[str, bytes], object]]:
    """Stores a blob."""
    with secure_azurite[0].client() as client:
        yield lambda name, content: client.get_blob_client(BUCKET, name).upload_blob(content, overwrite=True)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Opens a storage with the engine; variables are set in the environment of the process, None takes one away."""
    with contextlib.ExitStack() as stack:

        def opened(uri: str, **variables: str | None) -> Any:
            for name, value in variables.items():
                if value is None:
                    monkeypatch.delenv(name, raising=False)
                else:
                    monkeypatch.setenv(name, value)
            scheme = uri.partition(":")[0]
            plugins = PluginManager.discover({"MX_PREFER": f"{scheme}=mx-streamer", "MX_STRICT_PLUGINS": "1"})
            registered, storage = plugins.open(STORAGE, ModelURI.parse(uri), os.environ)
            assert "mx-streamer" == registered.plugin.name
            return stack.enter_context(contextlib.closing(storage))

        yield opened


@pytest.fixture
def on_s3(opened: Callable[..., Any], s3_server: SeaweedFS) -> Callable[..., Any]:
    """Opens a storage on the server."""

    def on_s3(uri: str = f"s3://{BUCKET}", user: str = "admin", **variables: str | None) -> Any:
        return opened(uri, **{**s3_server.environ(user), **variables})

    return on_s3


@pytest.fixture
def on_gcs(opened: Callable[..., Any], gcs_environ: dict[str, str]) -> Callable[..., Any]:
    """Opens a storage on the emulator."""

    def on_gcs(uri: str = f"gs://{BUCKET}", **variables: str | None) -> Any:
        return opened(uri, **{**gcs_environ, **variables})

    return on_gcs


@pytest.fixture
def on_azure(opened: Callable[..., Any], azure_environ: dict[str, str]) -> Callable[..., Any]:
    """Opens a storage on the Blob service."""

    def on_azure(uri: str = f"az://{BUCKET}", **variables: str | None) -> Any:
        return opened(uri, **{**azure_environ, **variables})

    return on_azure


@pytest.fixture
def load_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., mx.LoadReport]:
    """Uploads a checkpoint of three files, and loads it: its tensors are right."""

    def load_all(upload: Callable[..., str], environ: Mapping[str, str], **settings: str) -> mx.LoadReport:
        directory = generate_sharded(tmp_path / "checkpoint", shards=3, layers=2, hidden=128)
        uri = upload(directory, BUCKET, "streamed")
        for name, value in {**environ, "MX_PREFER": f"{uri.partition(':')[0]}=mx-streamer"}.items():
            monkeypatch.setenv(name, value)
        expected = {
            name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
        }
        target = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        report = mx.load_into(target, uri, environ={**os.environ, **settings})
        for name, tensor in expected.items():
            assert torch.equal(tensor.view(torch.uint8), target[name].view(torch.uint8)), name
        return report

    return load_all


@pytest.fixture
def failure() -> Callable[..., BackendError]:
    """The error of a batch of one request."""

    def failure(storage: Any, path: str, version: str | None = None, length: int = 10) -> BackendError:
        (completion,) = storage.read_batch([ReadRequest(path, 0, memoryview(bytearray(length)), version)])
        assert completion.error is not None
        return completion.error  # type: ignore[no-any-return]

    return failure
