"""Storages that read with the engine, and the environment that it reads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from devtools.missing import ToolMissingError
from devtools.seaweedfs import SeaweedFS
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.uri import ModelURI

BUCKET = "models"


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("runai_model_streamer_s3") is None:
        raise ToolMissingError("runai-model-streamer-s3: its wheels need Linux with glibc 2.30")
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
