"""Several servers without a common directory: one downloads a model, and the others read it from there."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from devtools.redis_server import RedisServer
from modelexpress_core.errors import BackendError
from modelexpress_core.sources.cache_management import CacheManagement
from tests.support.serving import Serving

_CONTENT = {"config.json": b"{}", "model.bin": os.urandom(20 << 20)}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        for name, content in _CONTENT.items():
            hub.put("org/model", name, content)
        yield hub


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def replica(
    start: Callable[..., Serving], redis: RedisServer, hub: FakeHub, tmp_path: Path
) -> Callable[[], tuple[Serving, CacheManagement, Path]]:
    """Starts one more replica."""
    made: list[Path] = []

    def replica() -> tuple[Serving, CacheManagement, Path]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        made.append(tmp_path / f"cache-{len(made)}")
        variables = {
            "MX_METADATA_BACKEND": "redis",
            "REDIS_URL": redis.url,
            "MX_CACHE_MIN_FREE_BYTES": "1",
            "MX_CACHE_ENDPOINT": f"127.0.0.1:{port}",
            "MX_SERVER_BULK_PORT": "18002",
            **hub.environ(),
        }
        serving = start("--cache-dir", str(made[-1]), "--port", str(port), **variables)
        return serving, CacheManagement.from_env(serving.url, {}), made[-1]

    return replica


def origin_bytes(hub: FakeHub) -> int:
    """Bytes of the large file that the stand-in was asked for."""
    total = 0
    for request in hub.requests:
        first, _, last = (request.headers.get("range") or "").removeprefix("bytes=").partition("-")
        if request.server == "cdn" and last:
            total += int(last) - int(first) + 1
    return total


def ensure(client: CacheManagement) -> str:
    with client:
        return client.ensure("org/model", "", weights=True, on_progress=lambda _done, _whole: None)[1]


def ensure_in_the_end(client: CacheManagement) -> str:
    """As clients do: they ask again."""
    deadline = time.monotonic() + 120
    with client:
        while True:
            try:
                return client.ensure("org/model", "", weights=True, on_progress=lambda _done, _whole: None)[1]
            except BackendError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def content_of(directory: Path, version: str) -> dict[str, bytes]:
    files = directory / "models--org--model" / "snapshots" / version
    return {path.name: path.read_bytes() for path in files.iterdir()}


def test_four_cold_replicas_read_the_origin_once(
    replica: Callable[[], tuple[Serving, CacheManagement, Path]], hub: FakeHub
) -> None:
    """All four are asked at the same time; each has every byte in the end, in a directory of its own."""
    replicas = [replica() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        versions = set(pool.map(ensure, [client for _, client, _ in replicas]))

    [version] = versions
    assert all(_CONTENT == content_of(directory, version) for _, _, directory in replicas)
    assert len(_CONTENT["model.bin"]) == origin_bytes(hub)


def test_a_replica_that_starts_later_reads_another(
    replica: Callable[[], tuple[Serving, CacheManagement, Path]], hub: FakeHub
) -> None:
    """It asks the origin for the version alone."""
    first, client, directory = replica()
    version = ensure(client)
    hub.requests.clear()

    _, late, elsewhere = replica()

    assert version == ensure(late)
    assert _CONTENT == content_of(elsewhere, version) == content_of(directory, version)
    assert 0 == origin_bytes(hub)
    assert "mx_cache_replica_bytes_total" in first.metrics()


def test_the_death_of_the_one_that_downloads(
    replica: Callable[[], tuple[Serving, CacheManagement, Path]], hub: FakeHub
) -> None:
    """Another takes over once its lease has ended, and reads the origin."""
    arrived, release = threading.Event(), threading.Event()

    def hold(request: HubRequest) -> HubAnswer | None:
        if request.server == "cdn" and not release.is_set():
            arrived.set()
            release.wait(60)
        return None

    hub.before = hold
    first, client, _ = replica()
    _, other, elsewhere = replica()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ensure, client)
        assert arrived.wait(60)
        first.process.send_signal(signal.SIGKILL)
        asked.exception(60)
    release.set()

    version = ensure_in_the_end(other)

    assert _CONTENT == content_of(elsewhere, version)
