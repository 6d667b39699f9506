"""The cache of a server in this process: its end, its certificates, and what it waits for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from modelexpress_core.bulk.reading import BulkOffer, BulkRead, BulkReader
from modelexpress_core.bulk.requests import Run
from modelexpress_core.contracts.rights import Rights
from modelexpress_core.errors import AccessDeniedError
from modelexpress_core.plugins import PluginManager
from modelexpress_core.server.app import Server
from modelexpress_core.server.services import cached
from modelexpress_core.server.settings import CacheSettings, ServerSettings
from modelexpress_core.server.stores.memory import MemoryStore
from modelexpress_core.storage.http.requests import Origin
from modelexpress_core.wire.proto.modelexpress import cache_pb2
from modelexpress_core.wire.rpc import CACHE, stub
from modelexpress_core.wire.settings import AuthSettings, TlsSettings
from modelexpress_core.wire.tls import client_contexts
from tests.support.serving import Serving
from tests.support.waiting import eventually

_SECONDS = 60.0
_Code = grpc.StatusCode


def served(use: Callable[[Server], Any], cache: CacheSettings, **options: Any) -> Any:
    """What ``use`` returns, called in a thread while a server runs."""

    async def serve() -> Any:
        settings = ServerSettings(port=0, metrics_port=0, **options.pop("settings", {}))
        async with Server(settings, MemoryStore(), PluginManager.discover(), cache=cache, **options) as server:
            return await asyncio.to_thread(use, server)

    return asyncio.run(serve())


def settings_of(tmp_path: Path, **options: Any) -> CacheSettings:
    return CacheSettings(directory=str(tmp_path / "cache"), sources=("hf", "file"), min_free_bytes=1, **options)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    return tmp_path / "model"


def opened(channel: grpc.Channel, place: str, **call: Any) -> cache_pb2.ModelVersion:
    *_, last = stub(CACHE, channel)["OpenModel"](cache_pb2.OpenModelRequest(place=place), timeout=_SECONDS, **call)
    assert last.complete
    return cache_pb2.ModelVersion(place=last.place, version=last.version)


def test_bytes_that_do_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """UNAVAILABLE, with how many bytes of the model are there."""
    monkeypatch.setattr(cached, "_WAIT_SECONDS", 0.3)
    content = bytes(20 << 20)

    def cut(request: HubRequest) -> HubAnswer | None:
        return (
            (503, {}, b"") if request.server == "cdn" and "bytes=0-" not in request.headers.get("range", "") else None
        )

    def use(server: Server) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            calls = stub(CACHE, channel)
            first = next(calls["OpenModel"](cache_pb2.OpenModelRequest(place="org/model"), timeout=_SECONDS))
            version = cache_pb2.ModelVersion(place=first.place, version=first.version)

            def status() -> tuple[Any, int]:
                ranges = [cache_pb2.FileRange(offset=len(content) - 10, length=10)]
                request = cache_pb2.ReadFileRequest(model=version, path="model.bin", ranges=ranges)
                with pytest.raises(grpc.RpcError) as raised:
                    list(calls["ReadFile"](request, timeout=_SECONDS))
                error: Any = raised.value
                return error.code(), int(dict(error.trailing_metadata()).get("mx-present-bytes", -1))

            assert eventually(lambda: status()[1] > 0)
            code, present = status()
            assert _Code.UNAVAILABLE == code
            assert present < len(content)

    with FakeHub() as hub:
        hub.put("org/model", "model.bin", content)
        hub.before = cut
        served(use, settings_of(tmp_path), environ={**hub.environ(), "MX_RETRY_BUDGET_SECONDS": "30"})


def test_those_who_wait_do_not_keep_others_from_reading(tmp_path: Path, model: Path) -> None:
    """More wait for a file that has not begun than the server has threads."""
    release = threading.Event()

    def hold(request: HubRequest) -> HubAnswer | None:
        if request.server == "cdn":
            release.wait(_SECONDS)
        return None

    def use(server: Server) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            there = opened(channel, f"file{model}")
            calls = stub(CACHE, channel)
            first = next(calls["OpenModel"](cache_pb2.OpenModelRequest(place="org/model"), timeout=_SECONDS))
            version = cache_pb2.ModelVersion(place=first.place, version=first.version)

            def read(version: cache_pb2.ModelVersion, path: str, length: int) -> Any:
                ranges = [cache_pb2.FileRange(length=length)]
                request = cache_pb2.ReadFileRequest(model=version, path=path, ranges=ranges)
                return calls["ReadFile"](request, timeout=_SECONDS)

            waiting = [read(version, "model.safetensors", 1000) for _ in range(40)]
            begun = time.monotonic()
            assert 1 == len(list(read(there, "config.json", 2)))
            assert time.monotonic() - begun < 10
            assert not any(each.done() for each in waiting)
            release.set()
            assert all(len(list(each)) == 1 for each in waiting)

    with FakeHub() as hub:
        hub.put("org/model", "model.safetensors", bytes(5000))
        hub.before = hold
        try:
            served(use, settings_of(tmp_path), environ=hub.environ())
        finally:
            release.set()


def test_the_bulk_channel_has_the_certificate_of_the_server(tmp_path: Path, model: Path) -> None:
    """And a ticket is worth nothing without the certificate that its reader showed."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    pairs = {}
    for name in ("127.0.0.1", "reader.example", "thief.example"):
        authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(str(tmp_path / name))
        pairs[name] = TlsSettings(str(tmp_path / "ca.pem"), str(tmp_path / name), str(tmp_path / name))

    def use(server: Server) -> None:
        pair = (tmp_path / "reader.example").read_bytes()
        credentials = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes(), pair, pair)
        with grpc.secure_channel(f"127.0.0.1:{server.port}", credentials) as channel:
            version = opened(channel, f"file{model}")
            offer = stub(CACHE, channel)["OpenBulk"](cache_pb2.OpenBulkRequest(model=version), timeout=_SECONDS)
        assert server.bulk_port == offer.port

        def read(tls: TlsSettings) -> bytes:
            destination = memoryview(bytearray(2))
            where = BulkOffer(Origin("127.0.0.1", offer.port, tls=True), offer.ticket, offer.content)
            contexts = client_contexts(tls)
            reader = BulkReader(where, connect_timeout_seconds=10, patience_seconds=30, tls_context=contexts)
            with contextlib.closing(reader):
                list(reader.read([BulkRead(Run("config.json", 0, 2), destination)]))
            return bytes(destination)

        assert b"{}" == read(pairs["reader.example"])
        for thief in (pairs["thief.example"], TlsSettings(authorities=str(tmp_path / "ca.pem"))):
            with pytest.raises(AccessDeniedError, match="HTTP 401"):
                read(thief)

    served(use, settings_of(tmp_path), tls=pairs["127.0.0.1"], auth=AuthSettings(mode="mtls"))


@pytest.mark.parametrize("plaintext", [False, True])
def test_without_tls_tickets_stay_on_this_host(tmp_path: Path, model: Path, plaintext: bool) -> None:
    """Where callers are authenticated; unless the operator trusts the network."""
    (tmp_path / "tokens").write_text("reader:reader-token-0123456789\n")
    auth = AuthSettings(mode="token", tokens=str(tmp_path / "tokens"), rights=Rights())
    other = next(
        (str(each[4][0]) for each in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)), "127.0.0.1"
    )

    def use(server: Server) -> None:
        token = (("authorization", "Bearer reader-token-0123456789"),)
        codes = []
        for address in ("127.0.0.1", other):
            with grpc.insecure_channel(f"{address}:{server.port}") as channel:
                version = opened(channel, f"file{model}", metadata=token)
                call = stub(CACHE, channel)["OpenBulk"]
                with contextlib.suppress(grpc.RpcError):
                    call(cache_pb2.OpenBulkRequest(model=version), metadata=token, timeout=_SECONDS)
                    codes.append(address)
        expected = ["127.0.0.1", other] if plaintext or other.startswith("127.") else ["127.0.0.1"]
        assert expected == codes

    served(use, settings_of(tmp_path, bulk_plaintext=plaintext), auth=auth, settings={"host": "0.0.0.0"})


def test_the_end_of_a_server_waits_for_no_storage(start: Callable[..., Serving], tmp_path: Path) -> None:
    """Not for one that does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        serving = start("--cache-dir", str(tmp_path / "cache"), HF_ENDPOINT=endpoint, MX_DRAIN_SECONDS="0.1")
        with grpc.insecure_channel(serving.url) as channel:
            call = stub(CACHE, channel)["OpenModel"](cache_pb2.OpenModelRequest(place="org/model"), timeout=_SECONDS)
            connection, _ = silent.accept()
            begun = time.monotonic()
            serving.ended()
            call.cancel()
            connection.close()
    assert time.monotonic() - begun < 20
