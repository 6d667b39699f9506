"""Metadata in a real Redis: the contract of metadata stores, restarts, two servers on one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
import trustme

from devtools.redis_server import RedisServer
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.contracts.metadata_store import (
    LeaderLease,
    MetadataStore,
    Quota,
    SourceQuery,
    SourceRecord,
    StoredSource,
    StoreFullError,
    StoreUnavailableError,
    UnreadableRecordError,
)
from modelexpress_core.errors import InvalidURIError, UnavailableError
from modelexpress_core.server.stores.redis import RedisStore, open_redis
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.testing import MetadataStoreContract
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from tests.support.serving import Serving
from tests.support.waiting import eventually

_IDENTITY = SourceIdentity("acme/model")
_READY = p2p_pb2.SOURCE_STATUS_READY


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


class TestRedisStore(MetadataStoreContract):
    @pytest.fixture
    def open_store(self, redis_server: RedisServer) -> Callable[[], MetadataStore]:
        return lambda: RedisStore(redis_server.url)


def test_the_uri(redis_server: RedisServer) -> None:
    """Database, password and options of the URI are those of the connection."""
    with RedisServer("--requirepass", "pass word") as server:
        good = ModelURI.parse(f"redis://:pass%20word@127.0.0.1:{server.port}/3?socket_timeout=2")
        wrong = ModelURI.parse(f"redis://:wrong@127.0.0.1:{server.port}/3")

        async def asked(uri: ModelURI) -> None:
            store = open_redis(uri, {})
            try:
                await store.check()
            finally:
                await store.close()

        asyncio.run(asked(good))
        with pytest.raises(StoreUnavailableError) as raised:
            asyncio.run(asked(wrong))

    assert "wrong" not in str(raised.value).replace("WRONGPASS", "")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("redis://127.0.0.1/models", "'models' is no number"),
        ("redis://:hush@127.0.0.1/0?sokcet_timeout=2", "sokcet_timeout"),
        ("redis://:hush@127.0.0.1/0?socket_timeout=soon", "socket_timeout"),
    ],
)
def test_a_uri_that_makes_no_sense(uri: str, said: str) -> None:
    """Is told before anything is served, without the password."""
    with pytest.raises(InvalidURIError, match=said) as raised:
        open_redis(ModelURI.parse(uri), {})

    assert "hush" not in str(raised.value)


@contextlib.asynccontextmanager
async def _behind_tls(port: int, authority: trustme.CA) -> AsyncIterator[int]:
    """A port that speaks TLS, and passes on to ``port`` what it is told."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def test_tls(redis_server: RedisServer, tmp_path: Path) -> None:
    """``rediss`` speaks it, and trusts the authority that the URI names, and no other."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    source = StoredSource(SourceRecord("id", "w", "m", 0, 2), b"", b"")

    async def live() -> bool:
        async with _behind_tls(redis_server.port, authority) as port:
            trusting = open_redis(ModelURI.parse(f"rediss://127.0.0.1:{port}/5?ssl_ca_certs={tmp_path}/ca.pem"), {})
            distrusting = open_redis(ModelURI.parse(f"rediss://127.0.0.1:{port}/5"), {})
            plain = open_redis(ModelURI.parse(f"redis://127.0.0.1:{port}/5?socket_timeout=1"), {})
            try:
                await trusting.publish(source)
                for store in (distrusting, plain):
                    with pytest.raises(StoreUnavailableError):
                        await store.check()
                return await trusting.get("id", "w") is not None
            finally:
                for store in (trusting, distrusting, plain):
                    await store.close()

    assert asyncio.run(live())


def test_many_calls_at_once(redis_server: RedisServer) -> None:
    """Those that find all connections in use wait for one, and none of them fails."""

    async def scenario() -> list[bool]:
        store = RedisStore(redis_server.url)
        await store.publish(StoredSource(SourceRecord("many", "w", "m"), b"", b""))
        known = await asyncio.gather(*(store.update("many", "w", _READY, None, "") for _ in range(500)))
        await store.close()
        return known

    known = asyncio.run(scenario())

    assert [True] * 500 == known


def test_what_redis_drops_heals() -> None:
    """A source that it evicted is unknown to the next heartbeat, and nothing is left of it."""
    with RedisServer() as server:
        direct = redis.Redis(port=server.port)

        async def live() -> tuple[bool, object]:
            store = RedisStore(server.url)
            try:
                await store.publish(StoredSource(SourceRecord("id", "w", "m", 0, 2), b"", b""))
                [key] = direct.keys("*source:*id:w")
                direct.delete(key)
                await store.reap(0, 3600)
                known = await store.update("id", "w", 2, None, "")
                await store.publish(StoredSource(SourceRecord("id", "w", "m", 0, 2), b"", b""))
                for status in range(100, 200):
                    await store.update("id", "w", status, None, "")
                return known, await store.counts()
            finally:
                await store.close()

        known, counts = asyncio.run(live())
        states = direct.smembers("{mx}:states")
        direct.close()

    assert (False, {199: 1}, {b"199"}) == (known, counts, states)


@pytest.mark.parametrize(
    "damage",
    [
        {"record": "no JSON"},
        {"record": "[" * 100_000},
        {"record": json.dumps(["id", "w"])},
        {"record": json.dumps(["id", "w", "m", "rank", "", {}, None, None, ""])},
        {"record": json.dumps(["id", "w", "m", -1, "", {}, None, None, ""])},
        {"record": json.dumps(["id", "w", "m", 0, "", {"a": 1}, None, None, ""])},
        {"record": json.dumps(["id", "w", "m", 0, "", 7, None, None, ""])},
        {"record": '["id", "w", "\\ud800", 0, "", {}, null, null, ""]'},
        {"record": b"\xff\xfe"},
        {"updated": "yesterday"},
        {"load": "much"},
        None,
    ],
)
def test_a_damaged_record_harms_no_other(redis_server: RedisServer, damage: dict[str, str | bytes] | None) -> None:
    """Lists leave it out and count it, also where its key holds no hash; the next publication replaces it."""
    direct = redis.Redis(port=redis_server.port)
    direct.flushall()

    async def scenario() -> None:
        store = RedisStore(redis_server.url)
        try:
            for worker_id in ("w", "other"):
                await store.publish(StoredSource(SourceRecord("id", worker_id, "m", 0, _READY), b"", b""))
            [key] = direct.keys("*source:*id:w")
            if damage is None:
                direct.set(key, "no hash")
            else:
                direct.hset(key, mapping=damage)

            for query in (SourceQuery(), SourceQuery("id"), SourceQuery(None, "m")):
                listing = await store.list(query)
                assert (["other"], 1) == ([each.worker_id for each in listing.records], listing.unreadable)
            with pytest.raises(UnreadableRecordError):
                await store.get("id", "w")
            await store.update("id", "w", _READY, None, "")
            await store.reap(0, 3600)
            await store.reap(3600, 3600)
            await store.publish(StoredSource(SourceRecord("id", "w", "m", 0, _READY), b"", b""))

            listing = await store.list(SourceQuery())
            assert (["other", "w"], 0) == (sorted(each.worker_id for each in listing.records), listing.unreadable)
            await store.reap(0, 3600)
            await store.reap(3600, 0)
            assert [] == direct.keys("*")
        finally:
            await store.close()

    asyncio.run(scenario())
    direct.close()


def test_a_frozen_redis(start: Callable[..., Serving]) -> None:
    """200 callers with a deadline of 5 seconds are all told UNAVAILABLE; health answers, and later all is well."""
    with RedisServer() as server:
        serving = start("--metadata", server.url)
        with ServerClient(serving.url, deadline_seconds=5, retries=False) as client:
            client.publish(_IDENTITY, p2p_pb2.WorkerMetadata(status=_READY), "w")

            def ask(_: int) -> str:
                begun = time.monotonic()
                with pytest.raises(UnavailableError, match="metadata store"):
                    client.list_sources()
                assert time.monotonic() - begun < 5
                return client.health().status

            server.freeze()
            try:
                with ThreadPoolExecutor(200) as pool:
                    assert {"ok"} == set(pool.map(ask, range(200)))
            finally:
                server.thaw()
            assert eventually(lambda: _lists(client) == ["w"])


def _lists(client: ServerClient) -> list[str]:
    try:
        return [source.worker_id for source in client.list_sources()]
    except UnavailableError:
        return []


def test_what_redis_evicts_counts_no_longer(redis_server: RedisServer) -> None:
    """A quota counts records that are there: the reaper finds those that were evicted."""
    direct = redis.Redis(port=redis_server.port)
    direct.flushall()
    quota = Quota("owner", 10_000, 10_000)

    async def scenario() -> None:
        store = RedisStore(redis_server.url)
        try:
            await store.publish(StoredSource(SourceRecord("id", "a", "m", 0, _READY), b"", b""), quota)
            await store.publish(StoredSource(SourceRecord("id", "b", "m", 0, _READY), b"", b""), quota)
            with pytest.raises(StoreFullError):
                await store.publish(StoredSource(SourceRecord("id", "c", "m", 0, _READY), b"", b""), quota)
            direct.delete(*direct.keys("*source:*id:a"))
            await store.reap(0, 3600)
            await store.publish(StoredSource(SourceRecord("id", "c", "m", 0, _READY), b"", b""), quota)
        finally:
            await store.close()

    asyncio.run(scenario())
    direct.close()


def test_tokens_grow_after_flushall() -> None:
    """The lease is free at once, and its next token is larger than those that were lost."""
    with RedisServer() as server:
        direct = redis.Redis(port=server.port)

        async def leases() -> list[LeaderLease | None]:
            store = RedisStore(server.url)
            try:
                first = await store.lead("role", "a", 60.0)
                refused = await store.lead("role", "b", 60.0)
                direct.flushall()
                return [first, refused, await store.lead("role", "b", 60.0), await store.lead("role", "a", 60.0)]
            finally:
                await store.close()

        first, refused, second, late = asyncio.run(leases())
        direct.close()

    assert first is not None
    assert second is not None
    assert (None, None) == (refused, late)
    assert first.token < second.token


def test_no_index_is_left_of_what_was_removed() -> None:
    """All keys go with the last source."""
    with RedisServer() as server:

        async def scenario() -> None:
            store = RedisStore(server.url)
            for number in range(3):
                record = SourceRecord(f"s{number}", "w", f"m{number}", status=_READY)
                await store.publish(StoredSource(record, b"", b""))
            await store.reap(0, 3600)
            await store.reap(3600, 0)
            keys = [key async for key in store._redis.scan_iter()]
            assert [] == keys
            assert [] == list((await store.list(SourceQuery())).records)
            await store.close()

        asyncio.run(scenario())


def test_a_redis_that_forgets(start: Callable[..., Serving]) -> None:
    """While Redis is away calls are told UNAVAILABLE; then workers are told to publish again, and all is well."""
    with RedisServer() as server:
        serving = start("--metadata", server.url)
        url = serving.url
        beat = p2p_pb2.UpdateStatusRequest(mx_source_id=_IDENTITY.source_id, worker_id="w", status=_READY)
        with ServerClient(url, deadline_seconds=30) as client:
            client.publish(_IDENTITY, p2p_pb2.WorkerMetadata(status=_READY), "w")
            server.kill()
            for call in (client.list_sources, lambda: client.update_status(beat)):
                with pytest.raises(UnavailableError, match="metadata store"):
                    call()
            server.start()

            assert not _answer(lambda: client.update_status(beat)).success
            assert client.publish(_IDENTITY, p2p_pb2.WorkerMetadata(status=_READY), "w").success
            assert client.update_status(beat).success
            assert ["w"] == [source.worker_id for source in client.list_sources()]


def test_a_restart_under_load(start: Callable[..., Serving]) -> None:
    """Of a Redis that keeps its data: each call is answered right or with UNAVAILABLE, never with too few sources."""
    names = {f"w-{number}" for number in range(50)}
    ended = threading.Event()
    refused: Counter[str] = Counter()

    def beat(name: str) -> int:
        request = p2p_pb2.UpdateStatusRequest(mx_source_id=_IDENTITY.source_id, worker_id=name, status=_READY)
        answered = 0
        with ServerClient(url, deadline_seconds=30) as client:
            while not ended.is_set():
                try:
                    assert client.update_status(request).success
                    listed = {source.worker_id for source in client.list_sources()}
                except UnavailableError as exc:
                    refused[exc.message.partition(":")[0]] += 1
                else:
                    assert names == listed
                    answered += 1
        return answered

    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as server:
        serving = start("--metadata", server.url)
        url = serving.url
        with ServerClient(url) as client:
            for name in names:
                client.publish(_IDENTITY, p2p_pb2.WorkerMetadata(status=_READY), name)
        with ThreadPoolExecutor(8) as pool:
            beating = [pool.submit(beat, name) for name in sorted(names)[:8]]
            for _ in range(3):
                time.sleep(0.3)
                server.kill()
                before = refused.total()
                assert eventually(lambda: refused.total() > before)  # noqa: B023 - asked here
                server.start()
            time.sleep(0.5)
            ended.set()
            answered = [each.result(60) for each in beating]
        assert all(answered)
        assert {"the server answered UNAVAILABLE"} == set(refused)
        _, said = serving.ended()
        assert "the metadata store does not answer" in said


def _answer(call: Callable[[], p2p_pb2.UpdateStatusResponse]) -> p2p_pb2.UpdateStatusResponse:
    """The first answer, as soon as there is one."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return call()
        except UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_two_servers_on_one(redis_server: RedisServer, start: Callable[..., Serving]) -> None:
    """What is published at one is found at the other; one of them reaps; a server that is killed leaves all there."""
    brisk = {"MX_HEARTBEAT_TIMEOUT_SECS": "0.5", "MX_GC_TIMEOUT_SECS": "2", "MX_REAPER_SCAN_INTERVAL_SECS": "0.2"}
    with RedisServer() as server:
        one, other = (start("--metadata", server.url, **brisk) for _ in range(2))
        with ServerClient(one.url) as first, ServerClient(other.url) as second:
            first.publish(_IDENTITY, p2p_pb2.WorkerMetadata(status=_READY), "w")
            assert second.metadata(_IDENTITY.source_id, "w").found
            one.end()
            deadline = time.monotonic() + 30
            while second.metadata(_IDENTITY.source_id, "w").found:
                assert time.monotonic() < deadline
                time.sleep(0.1)

        assert 'mx_server_reaped_total{action="removed"} 1.0' in other.metrics()
