"""What the storage of ``mx`` does beyond the contract of storages, against a server of this process."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.errors import BackendError, IntegrityError, SourceChangedError
from modelexpress_core.server.app import Server
from modelexpress_core.sources.cache_client import CacheClient
from modelexpress_core.uri import ModelURI
from mx_grpc_stream._storage import CacheStorage, open_cache
from tests.support.caching import serving_cache

#: A run of a thousand finds the same.
_FLIPS = 40

_CONTENT = bytes(range(256)) * 12_000  # three chunks, the last one shorter


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one file."""
    source = tmp_path_factory.mktemp("source")
    (source / "model").mkdir()
    (source / "model" / "weights.bin").write_bytes(_CONTENT)
    return source


@pytest.fixture(scope="module")
def server(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has the model."""
    with serving_cache(tmp_path_factory.mktemp("cache"), (f"file://{source}",), {}) as server:
        with CacheClient.from_env(f"127.0.0.1:{server.port}", {}) as client:
            client.follow(client.open(f"file{source}/model"))
        yield server


@pytest.fixture
def uri(server: Server, source: Path) -> ModelURI:
    """Of the model."""
    return ModelURI.parse(f"mx://127.0.0.1:{server.port}/file{source}/model")


@pytest.fixture
def storage(uri: ModelURI) -> Iterator[CacheStorage]:
    """Opened."""
    with contextlib.closing(open_cache(uri, {})) as storage:
        yield storage


def _read(storage: CacheStorage, path: str, start: int, end: int, version: str | None) -> bytes:
    buffer = bytearray(end - start)
    assert len(buffer) == storage.read_into(path, start, memoryview(buffer), version=version)
    return bytes(buffer)


def test_parts_of_chunks_are_compared_by_the_server(storage: CacheStorage, uri: ModelURI) -> None:
    """At the end, together with runs; the two are counted apart."""
    (info,) = storage.list(uri.path)
    assert info.version is not None
    got = _read(storage, info.path, 100, 1_500_000, info.version)
    runs = bytearray(3000)
    assert 3000 == storage.read_runs(info.path, 50, 100, 1000, memoryview(runs), version=info.version)
    before = storage.compared()
    storage.check_unchanged(info.path, version=info.version)

    assert _CONTENT[100:1_500_000] == got
    assert b"".join(_CONTENT[at : at + 100] for at in range(50, 30_000, 1000)) == runs
    assert (0, 0) == (before.here_bytes, before.by_server_bytes)
    after = storage.compared()
    assert (0, len(got) + 3000) == (after.here_bytes, after.by_server_bytes)


def test_reads_in_any_order_make_up_chunks(storage: CacheStorage, uri: ModelURI) -> None:
    """Nothing is left for the server then."""
    (info,) = storage.list(uri.path)
    assert info.version is not None
    for start, end in ((2_000_000, len(_CONTENT)), (0, 700_000), (700_000, 2_000_000)):
        assert _CONTENT[start:end] == _read(storage, info.path, start, end, info.version)
    storage.check_unchanged(info.path, version=info.version)

    assert (len(_CONTENT), 0) == (storage.compared().here_bytes, storage.compared().by_server_bytes)


def test_what_was_compared_is_kept_where_the_model_is_opened_again(uri: ModelURI, storage: CacheStorage) -> None:
    """By its name, after it was opened by its version: as a load does whose headers another storage has read."""
    (info,) = storage.list(uri.path)
    assert info.version is not None
    with contextlib.closing(open_cache(uri, {})) as other:
        _read(other, info.path, 100, 200, info.version)
        assert [info] == list(other.list(uri.path))
        other.check_unchanged(info.path, version=info.version)

        assert 100 == other.compared().by_server_bytes


def test_every_flip_on_the_wire_is_repaired_or_found(server: Server, source: Path) -> None:
    """Whole chunks are read again; the server finds damage in parts of chunks, and in runs."""
    draw = random.Random(3)
    flip: list[int] = []  # where to flip a bit of the next answer

    def policy(_number: int, head: bytes) -> Fault | None:
        if b"POST" not in head or not flip:
            return None
        return Fault("flip", flip.pop(), of_body=True, bits=1 << draw.randrange(8))

    repaired = found = 0
    with (
        TcpProxy("127.0.0.1", server.port, listen="127.0.0.4") as grpc,
        TcpProxy("127.0.0.1", server.bulk_port, policy, listen="127.0.0.4", listen_port=server.bulk_port),
    ):
        uri = ModelURI.parse(f"mx://127.0.0.4:{grpc.port}/file{source}/model")
        for number in range(_FLIPS):
            with contextlib.closing(open_cache(uri, {})) as storage:
                (info,) = storage.list(uri.path)
                assert info.version is not None
                start, end = sorted(draw.sample(range(len(_CONTENT) + 1), 2))
                buffer = bytearray(end - start)
                expected = _CONTENT[start:end]
                run, stride = 100, 1000
                if number % 4 == 3 and end - start >= stride:
                    count = (end - start) // stride
                    buffer = bytearray(count * run)
                    expected = b"".join(_CONTENT[start + n * stride :][:run] for n in range(count))
                flip.append(draw.randrange(len(buffer)))
                try:
                    if expected == _CONTENT[start:end]:
                        storage.read_into(info.path, start, memoryview(buffer), version=info.version)
                    else:
                        storage.read_runs(info.path, start, run, stride, memoryview(buffer), version=info.version)
                    assert not flip
                    storage.check_unchanged(info.path, version=info.version)
                except IntegrityError:
                    found += 1
                else:
                    assert expected == buffer, (start, end)
                    repaired += 1

    assert _FLIPS == repaired + found
    assert repaired
    assert found


def test_every_flip_in_a_cached_file_is_found(tmp_path: Path, source: Path) -> None:
    """By whole chunks, parts of chunks and runs; also where the file has its former time."""
    draw = random.Random(4)
    with serving_cache(tmp_path, (f"file://{source}",), {}) as server:
        with CacheClient.from_env(f"127.0.0.1:{server.port}", {}) as client:
            client.follow(client.open(f"file{source}/model"))
        blob = next(each for each in tmp_path.rglob("*") if each.is_file() and each.stat().st_size == len(_CONTENT))
        facts = blob.stat()
        uri = ModelURI.parse(f"mx://127.0.0.1:{server.port}/file{source}/model")
        for number in range(_FLIPS):
            start, end = sorted(draw.sample(range(len(_CONTENT) + 1), 2))
            run, stride = 100, 1000
            as_runs = number % 4 == 3 and end - start >= stride
            count = (end - start) // stride if as_runs else 1
            at = start + draw.randrange(count) * stride + draw.randrange(run) if as_runs else draw.randrange(start, end)
            with blob.open("r+b") as file:
                file.seek(at)
                file.write(bytes([_CONTENT[at] ^ 1 << draw.randrange(8)]))
            os.utime(blob, ns=(facts.st_atime_ns, facts.st_mtime_ns))
            with contextlib.closing(open_cache(uri, {})) as storage, pytest.raises(IntegrityError, match="cache"):
                (info,) = storage.list(uri.path)
                assert info.version is not None
                buffer = memoryview(bytearray(count * run if as_runs else end - start))
                if as_runs:
                    storage.read_runs(info.path, start, run, stride, buffer, version=info.version)
                else:
                    storage.read_into(info.path, start, buffer, version=info.version)
                storage.check_unchanged(info.path, version=info.version)
            with blob.open("r+b") as file:
                file.seek(at)
                file.write(_CONTENT[at : at + 1])
            os.utime(blob, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_a_version_that_is_nowhere_is_changed(storage: CacheStorage, uri: ModelURI) -> None:
    """It is not replaced by the one that there is."""
    with pytest.raises(SourceChangedError, match="could not read 10 bytes at 0 of mx://"):
        storage.read_into(f"{uri.path}/weights.bin", 0, memoryview(bytearray(10)), version="0" * 64)


def test_nothing_is_compared_where_that_is_turned_off(uri: ModelURI) -> None:
    """With the variable that turns off all digests."""
    with contextlib.closing(open_cache(uri, {"MX_VERIFY_DIGESTS": "0"})) as storage:
        (info,) = storage.list(uri.path)
        assert _CONTENT[5:50] == _read(storage, info.path, 5, 50, info.version)
        storage.check_unchanged(info.path, version=info.version or "")

        assert (0, 0) == (storage.compared().here_bytes, storage.compared().by_server_bytes)


def test_the_root_of_a_server_names_no_model(storage: CacheStorage) -> None:
    """And the message has the form of a URI."""
    with pytest.raises(BackendError) as raised:
        storage.stat("")

    assert "mx://server:8001/org/name" in str(raised.value)
