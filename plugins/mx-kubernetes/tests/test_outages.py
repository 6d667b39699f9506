"""API servers that are killed, frozen and restarted, and connections that break or fall silent: no list is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import attrs
import pytest

from devtools.kube_apiserver import KubeApiServer
from modelexpress_core.contracts.metadata_store import (
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
    StoreUnavailableError,
)
from mx_kubernetes._client import Kubernetes
from mx_kubernetes._objects import name_of
from mx_kubernetes._store import KubernetesStore

pytestmark = [pytest.mark.xdist_group("kubernetes outages"), pytest.mark.slow, pytest.mark.server]

InThread = Callable[..., Awaitable[object]]
_READY = SourceStatus.READY
_STALENESS = 6.0


@pytest.fixture(autouse=True)
def _nothing_configured(nothing_configured: None) -> None:
    pass


@pytest.fixture(scope="module")
def in_thread() -> Iterator[Callable[..., Awaitable[object]]]:
    """Calls a function beside the event loop, in a thread that lasts: what a thread starts ends with it."""
    with ThreadPoolExecutor(1) as pool:

        def in_thread(function: Callable[..., object], *arguments: object) -> Awaitable[object]:
            return asyncio.get_running_loop().run_in_executor(pool, lambda: function(*arguments))

        yield in_thread


@pytest.fixture(scope="module")
def server(in_thread: InThread) -> Iterator[KubeApiServer]:
    """One of its own, which these tests kill."""
    with KubeApiServer() as server:
        server.apply(files("mx_kubernetes").joinpath("crds.yaml").read_text("utf-8"))
        yield server


@pytest.fixture
def namespace(server: KubeApiServer) -> str:
    return server.new_namespace()


@pytest.fixture
def new_store(server: KubeApiServer, namespace: str, tmp_path: Path) -> Callable[..., KubernetesStore]:
    def new_store(port: int = 0) -> KubernetesStore:
        url = f"https://127.0.0.1:{port}" if port else None
        path = server.kubeconfig(tmp_path / f"kubeconfig-{port}", namespace, url=url)
        return KubernetesStore(
            Kubernetes({"KUBECONFIG": str(path)}), max_staleness_seconds=_STALENESS, heartbeat_seconds=2.0
        )

    return new_store


def source(worker: str, data: bytes = b"worker") -> StoredSource:
    return StoredSource(SourceRecord("source", worker, "acme/model", status=_READY), b"identity", data)


async def listed(store: KubernetesStore) -> set[str] | None:
    """The workers in a list; None if it is UNAVAILABLE."""
    try:
        return {record.worker_id for record in (await store.list(SourceQuery("source"))).records}
    except StoreUnavailableError:
        return None


async def eventually(condition: Callable[[], Awaitable[object]], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def opened(*stores: KubernetesStore) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for store in stores:
            await store.close()


class Relay:
    """A relay before the API server, whose connections can break or fall silent.

    Attributes:
        port: Its port.
        cut: Whether connections are closed at once.
    """

    def __init__(self, url: str) -> None:
        self._behind = int(url.rpartition(":")[2])
        self.cut = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self.close_all()

    async def close_all(self) -> None:
        """Close the connections that there are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def silence(self) -> None:
        """Pass nothing on of the connections that there are, and keep them open; new ones work."""
        self._flowing.clear()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.cut:
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._behind)
            flowing = self._flowing
            try:
                copies = [self._copy(reader, inner_writer, flowing), self._copy(inner_reader, writer, flowing)]
                await asyncio.gather(*copies)
            finally:
                inner_writer.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flowing: asyncio.Event) -> None:
        while data := await reader.read(65536):
            await flowing.wait()
            writer.write(data)
            await writer.drain()
        writer.close()


class Load:
    """Publications, heartbeats and lists without a pause, until ``ended`` is set.

    Attributes:
        confirmed: What was confirmed last of each worker; nothing after a publication without an answer, which may have
            arrived.
        lists: The workers of each list; None for UNAVAILABLE.
    """

    def __init__(self, stores: Sequence[KubernetesStore], workers: Sequence[str]) -> None:
        self._stores = stores
        self._workers = workers
        self._half = len(workers) // 2
        self.ended = asyncio.Event()
        self.confirmed = dict.fromkeys(workers, b"0")
        self.lists: list[set[str] | None] = []

    def run(self) -> list[asyncio.Future[None]]:
        published, beaten = self._workers[: self._half], self._workers[self._half :]
        tasks = [self._publish(self._stores[number % 2], worker) for number, worker in enumerate(published)]
        tasks += [self._beat(self._stores[0], beaten), *(self._list(store) for store in self._stores)]
        return [asyncio.ensure_future(task) for task in tasks]

    async def goes_on(self) -> bool:
        """Whether all publications since the last call were followed by others."""
        published = self._workers[: self._half]
        before = [self.confirmed.get(worker) for worker in published]
        await asyncio.sleep(0.1)
        after = [self.confirmed.get(worker) for worker in published]
        return all(new is not None and new != old for old, new in zip(before, after, strict=True))

    async def _publish(self, store: KubernetesStore, worker: str) -> None:
        while not self.ended.is_set():
            data = secrets.token_bytes(2000)
            try:
                await store.publish(source(worker, data))
                self.confirmed[worker] = data
            except StoreUnavailableError:
                self.confirmed.pop(worker, None)
                await asyncio.sleep(0.1)

    async def _beat(self, store: KubernetesStore, workers: Sequence[str]) -> None:
        while not self.ended.is_set():
            for worker in workers:
                with contextlib.suppress(StoreUnavailableError):
                    assert await store.update("source", worker, _READY, 0.5, "")
            await asyncio.sleep(0.1)

    async def _list(self, store: KubernetesStore) -> None:
        while not self.ended.is_set():
            self.lists.append(await listed(store))
            await asyncio.sleep(0.02)


def test_an_api_server_that_is_killed_under_load(
    server: KubeApiServer, in_thread: InThread, new_store: Callable[..., KubernetesStore]
) -> None:
    """No list lacks a worker; what was confirmed is there afterwards, and publications and heartbeats go on."""
    workers = [f"w{number}" for number in range(20)]

    async def scenario() -> list[set[str] | None]:
        one, other = new_store(), new_store()
        async with opened(one, other):
            for worker in workers:
                await one.publish(source(worker, b"0"))
            await eventually(lambda: _has_all(other, workers))
            load = Load((one, other), workers)
            running = load.run()
            await asyncio.sleep(0.5)
            await in_thread(server.kill)
            await eventually(lambda: _is_unavailable(one))
            await eventually(lambda: _is_unavailable(other))
            await in_thread(server.start)
            await eventually(lambda: _has_all(one, workers))
            await eventually(lambda: _has_all(other, workers))
            await eventually(load.goes_on)
            load.ended.set()
            await asyncio.gather(*running)
            for worker, data in load.confirmed.items():
                for store in (one, other):
                    await eventually(functools.partial(_holds, store, worker, data))
            return load.lists

    lists = asyncio.run(scenario())

    assert {frozenset(workers)} == {frozenset(each) for each in lists if each is not None}
    assert None in lists


async def _has_all(store: KubernetesStore, workers: list[str]) -> bool:
    return await listed(store) == set(workers)


async def _is_unavailable(store: KubernetesStore) -> bool:
    return await listed(store) is None


async def _holds(store: KubernetesStore, worker: str, data: bytes) -> bool:
    found = await store.get("source", worker)
    return found is not None and found.worker == data


def test_an_api_server_that_is_frozen(server: KubeApiServer, new_store: Callable[..., KubernetesStore]) -> None:
    """Its connections stay, and nothing comes: lists end with the bound, and come back with the API server."""

    async def scenario() -> None:
        store = new_store()
        async with opened(store):
            await store.publish(source("a"))
            begun = time.monotonic()
            server.freeze()
            try:
                assert await listed(store) == {"a"}
                await eventually(lambda: _is_unavailable(store))
                assert time.monotonic() - begun > 1.0, "a pause that is short harms nobody"
                with pytest.raises(StoreUnavailableError, match=r"has not been confirmed for \d+ s"):
                    await store.list(SourceQuery())
                for call in (store.counts(), store.get("source", "a"), store.publish(source("b")), store.reap(1, 1)):
                    with pytest.raises(StoreUnavailableError):
                        await call
            finally:
                server.thaw()
            await eventually(lambda: _has_all(store, ["a"]))
            await store.publish(source("b"))
            assert await listed(store) == {"a", "b"}

    asyncio.run(scenario())


def test_a_connection_that_falls_silent(server: KubeApiServer, new_store: Callable[..., KubernetesStore]) -> None:
    """A watch whose other end is gone brings nothing. No list is older than the bound, and it connects again."""

    async def scenario() -> None:
        async with Relay(server.url) as relay:
            behind, direct = new_store(relay.port), new_store()
            async with opened(behind, direct):
                await direct.publish(source("a"))
                await eventually(lambda: _has_all(behind, ["a"]))
                relay.silence()
                begun = time.monotonic()
                await direct.publish(source("b"))
                published = time.monotonic()
                while True:
                    asked = time.monotonic()
                    found = await listed(behind)
                    if found == {"a", "b"}:
                        break
                    if found is not None:
                        assert asked - published < _STALENESS + 1, "the list is older than the bound"
                    assert asked - begun < 120
                    await asyncio.sleep(0.02)

    asyncio.run(scenario())


def number_of_lists(server: KubeApiServer, namespace: str) -> int:
    """How often all sources were listed until now."""
    start = f"/apis/modelexpress.io/v1alpha1/namespaces/{namespace}/modelsources?limit=100"
    return sum(event["requestURI"].startswith(start) for event in server.audited("admin"))


def label_object(server: KubeApiServer, path: str, label: object) -> None:
    server.request("PATCH", path, label, content_type="application/merge-patch+json")


def test_a_watch_that_missed_too_much(
    server: KubeApiServer, in_thread: InThread, namespace: str, new_store: Callable[..., KubernetesStore]
) -> None:
    """The API server no longer has so old a version (410): all is listed again, and what was removed is gone."""
    path = f"/apis/modelexpress.io/v1alpha1/namespaces/{namespace}/modelsources"

    async def scenario() -> None:
        async with Relay(server.url) as relay:
            behind, direct = new_store(relay.port), new_store()
            async with opened(behind, direct):
                for worker in "abc":
                    await direct.publish(source(worker))
                await eventually(lambda: _has_all(behind, ["a", "b", "c"]))
                relay.cut = True
                await relay.close_all()
                await direct.close()
                listings = number_of_lists(server, namespace)
                name = name_of("source", "b")
                for number in range(300):
                    label = {"metadata": {"labels": {"n": str(number)}}}
                    await in_thread(label_object, server, f"{path}/{name}", label)
                await in_thread(server.request, "DELETE", f"{path}/{name_of('source', 'a')}")
                # A restarted API server knows no versions from before.
                await in_thread(server.kill)
                await in_thread(server.start)
                relay.cut = False
                await eventually(lambda: _has_all(behind, ["b", "c"]))
                assert number_of_lists(server, namespace) > listings

    asyncio.run(scenario())


def test_a_change_that_the_watch_did_not_bring(
    server: KubeApiServer, namespace: str, new_store: Callable[..., KubernetesStore]
) -> None:
    """The number of objects in etcd shows it, and all are listed again."""

    async def scenario() -> None:
        store = new_store()
        async with opened(store):
            for worker in "ab":
                await store.publish(source(worker))
            entry = store._index.get(name_of("source", "a"))
            assert entry is not None
            store._index.deleted(entry.source.name, entry.source.uid)
            assert await listed(store) == {"b"}
            await eventually(lambda: _has_all(store, ["a", "b"]))

    asyncio.run(scenario())


def test_an_api_server_that_was_set_back(server: KubeApiServer, new_store: Callable[..., KubernetesStore]) -> None:
    """As from a backup: its versions are smaller than those that are known, and nothing would replace these."""

    async def scenario() -> None:
        async with Relay(server.url) as relay:
            store, other = new_store(relay.port), new_store()
            async with opened(store, other):
                await store.publish(source("a"))
                await eventually(lambda: _has_all(other, ["a"]))
                relay.cut = True
                await relay.close_all()
                entry = store._index.get(name_of("source", "a"))
                assert entry is not None
                assert store._opened is not None
                later = "9" * 12
                entry.source = attrs.evolve(entry.source, version=later)
                store._opened.view._sources.version = later
                await other.publish(source("a", b"after the backup"))
                await other.publish(source("b"))
                relay.cut = False

                await eventually(lambda: _has_all(store, ["a", "b"]))
                await eventually(lambda: _holds(store, "a", b"after the backup"))

    asyncio.run(scenario())


def test_heartbeats_that_cannot_be_written_are_refused(
    server: KubeApiServer, new_store: Callable[..., KubernetesStore]
) -> None:
    """A worker must not believe that others can see its heartbeat; they are accepted again once one was written."""

    async def scenario() -> None:
        async with Relay(server.url) as relay:
            store = new_store(relay.port)
            async with opened(store):
                await store.publish(source("a"))
                assert await store.update("source", "a", _READY, 0.5, "")
                relay.cut = True
                await relay.close_all()

                async def refused() -> bool:
                    try:
                        await store.update("source", "a", _READY, 0.5, "")
                    except StoreUnavailableError:
                        return True
                    return False

                await eventually(refused)
                relay.cut = False

                async def accepted() -> bool:
                    return not await refused()

                await eventually(accepted)

    asyncio.run(scenario())
