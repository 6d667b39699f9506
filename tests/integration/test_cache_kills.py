"""A cache whose process is killed at any point: what it has is whole, and the next process goes on where it ended."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from modelexpress_core.server.cache import ModelCache
from modelexpress_core.server.settings import CacheSettings
from tests.support.waiting import eventually

#: How often the process is killed; by hand it was 100 times.
_KILLS = int(os.environ.get("MX_TEST_KILLS", "6"))

_SETTINGS = CacheSettings(sources=("hf",), min_free_bytes=0)

_FILES = {f"model-{number}.bin": 3_000_000 + number for number in range(8)} | {"config.json": 100, "empty.txt": 0}

_PROGRAM = """
import sys
from modelexpress_core.server.cache import ModelCache
from modelexpress_core.server.settings import CacheSettings
with ModelCache(sys.argv[1], settings=CacheSettings(sources=("hf",), min_free_bytes=0)) as cache:
    print("open", flush=True)
    cache.begin("org/model").wait(240)
print("done", flush=True)
assert "torch" not in sys.modules
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        for name, size in _FILES.items():
            hub.put("org/model", name, random.Random(name).randbytes(size))

        def slowly(request: HubRequest) -> HubAnswer | None:
            if request.server == "cdn":
                time.sleep(0.02)
            return None

        hub.before = slowly
        yield hub


def _start(hub: FakeHub, directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(directory)],
        env={**os.environ, **hub.environ(), "MX_CHUNK_BYTES": str(256 << 10), "MX_CONCURRENCY": "4"},
        stdout=subprocess.PIPE,
        text=True,
    )


def _whole(cache: ModelCache) -> bool:
    """Whether the model is complete; then it is right to the last byte, in the cache and for the Hub's tools."""
    found = cache.find("org/model")
    if found is None or not found.complete:
        return False
    assert () == tuple(cache.validate(found))
    assert found.directory is not None
    for name, size in _FILES.items():
        content = Path(found.directory, name).read_bytes()
        assert hashlib.sha256(random.Random(name).randbytes(size)).digest() == hashlib.sha256(content).digest()
    return True


def test_a_killed_download_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    """At random points between the first request and the end; nothing is left over in the end."""
    chance = random.Random(1)
    directory = tmp_path / "cache"
    complete = 0
    for _ in range(_KILLS):
        with _start(hub, directory) as child:
            assert child.stdout is not None
            assert "open\n" == child.stdout.readline()
            time.sleep(chance.uniform(0.0, 1.2))
            child.send_signal(signal.SIGKILL)
        with ModelCache(directory, settings=_SETTINGS, environ=hub.environ()) as cache:
            if _whole(cache):
                complete += 1
                [(snapshot, _)] = cache.snapshots()
                cache.remove(snapshot)
    with _start(hub, directory) as child:
        assert child.wait(240) == 0
    with ModelCache(directory, settings=_SETTINGS, environ=hub.environ()) as cache:
        assert _whole(cache)
    assert complete < _KILLS, "it was always done before it was killed"
    assert [] == list((directory / ".mx" / "downloads").iterdir())
    assert not list(directory.rglob("*.mx-new"))


def test_what_had_arrived_is_not_downloaded_again(tmp_path: Path) -> None:
    """The process is killed at half the download: less than 2 % of the bytes cross the network twice."""
    size = 64 << 20
    content = random.Random(1).randbytes(size)
    sent = 0
    lock = threading.Lock()
    with FakeHub() as hub:
        hub.put("org/model", "model.bin", content)

        def count(request: HubRequest) -> HubAnswer | None:
            nonlocal sent
            if request.server == "cdn":
                begin, end = request.headers["Range"].removeprefix("bytes=").split("-")
                with lock:
                    sent += int(end) + 1 - int(begin)
                time.sleep(0.01)
            return None

        hub.before = count
        with _start(hub, tmp_path / "cache") as child:
            eventually(lambda: sent > size // 2)
            child.send_signal(signal.SIGKILL)
        assert size // 2 < sent < size
        with _start(hub, tmp_path / "cache") as child:
            assert child.wait(240) == 0

    assert size <= sent < 1.02 * size
    with ModelCache(tmp_path / "cache", settings=_SETTINGS, environ=hub.environ()) as cache:
        found = cache.find("org/model")
        assert found is not None
        assert () == tuple(cache.validate(found))
