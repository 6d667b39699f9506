"""The service that keeps sources: time, lists, and both lists of tensors, with a store in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
from prometheus_client import CollectorRegistry

from modelexpress_core.contracts.metadata_store import (
    Listing,
    SourceQuery,
    SourceRecord,
    SourceStatus,
    StoredSource,
    UnreadableRecordError,
)
from modelexpress_core.server.metrics import SourceServiceMetrics
from modelexpress_core.server.services.p2p import P2pService
from modelexpress_core.server.stores.memory import MemoryStore
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

_READY = SourceStatus.READY
_TENSORS = [p2p_pb2.TensorDescriptor(name="w", addr=1, size=2, dtype="bf16")]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Context:
    """What the service uses of gRPC's context."""

    def __init__(self) -> None:
        self.trailing: dict[str, str] = {}

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.trailing = dict(metadata)


def source(worker_id: str, **changes: Any) -> StoredSource:
    return StoredSource(attrs.evolve(SourceRecord("s", worker_id, "m", status=_READY), **changes), b"", b"")


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]  # a coroutine


async def listed(service: P2pService, context: Context | None = None, **fields: Any) -> list[str]:
    return [each.worker_id for each in (await response(service, context, **fields)).instances]


async def response(service: P2pService, context: Context | None = None, **fields: Any) -> p2p_pb2.ListSourcesResponse:
    data = await service.list_sources(p2p_pb2.ListSourcesRequest(**fields), context or Context())  # type: ignore[arg-type]
    return p2p_pb2.ListSourcesResponse.FromString(data)


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-7200.0, 7200.0])
def test_a_wall_clock_that_is_set(jump: float) -> None:
    """It brings no dead worker back, and removes no living one; times are of the new clock."""
    steady, wall = Clock(), Clock()
    store = MemoryStore(steady, wall)
    service = P2pService(store, 90)

    async def scenario() -> None:
        await store.publish(source("dead"))
        await store.publish(source("quiet"))
        steady.now += 60
        wall.now += 60
        await store.update("s", "quiet", _READY, None, "")
        wall.now += jump
        steady.now += 40
        wall.now += 40
        await store.publish(source("lively"))

        answer = await response(service, status_filter=_READY)
        metadata = await service.get_metadata(
            p2p_pb2.GetMetadataRequest(mx_source_id="s", worker_id="dead"),
            Context(),  # type: ignore[arg-type]
        )

        assert ["lively", "quiet"] == [each.worker_id for each in answer.instances]
        assert [wall.now * 1000, wall.now * 1000 - 40_000] == [each.updated_at for each in answer.instances]
        assert p2p_pb2.SOURCE_STATUS_STALE == metadata.worker.status
        assert (1, 0) == attrs.astuple(await store.reap(90, 3600))

    run(scenario)


# -- lists -------------------------------------------------------------------------------------------------------------


def fat(worker_id: str) -> StoredSource:
    return source(worker_id, topology={"k": "x" * 20_000})


def test_a_list_without_pages_has_the_newest() -> None:
    """As many as there is room for; metadata at the end has the number of the others, and a metric counts it."""
    clock = Clock()
    store = MemoryStore(clock)
    metrics = SourceServiceMetrics(registry := CollectorRegistry())
    service = P2pService(store, 90, metrics=metrics, list_bytes=100_000)

    async def scenario() -> None:
        for number in range(9):
            await store.publish(fat(f"w-{number}"))
            clock.now += 1
        context = Context()

        assert ["w-8", "w-7", "w-6"] == await listed(service, context)
        assert {"mx-left-out": "6"} == context.trailing
        assert ["w-8", "w-7"] == await listed(service, context := Context(), limit=2)
        assert {} == context.trailing

    run(scenario)
    assert 1.0 == registry.get_sample_value("mx_server_lists_truncated_total")


def test_pages_have_every_source_once() -> None:
    """In the order of ids; with a limit those that spoke last; and a source that is larger than a page is left out."""
    clock = Clock()
    store = MemoryStore(clock)
    service = P2pService(store, 90)

    async def scenario() -> None:
        await store.publish(source("giant", topology={"k": "x" * 200_000}))
        names = [f"w-{number}" for number in range(9)]
        for name in names:
            clock.now += 1
            await store.publish(fat(name))

        assert (names, ["1"]) == await in_pages()
        assert (["w-0", *names[5:]], []) == await in_pages(limit=5)  # w-0 sent a heartbeat above

    async def in_pages(**fields: Any) -> tuple[list[str], list[str]]:
        found: list[str] = []
        left_out: list[str] = []
        token = ""
        for _ in range(20):
            answer = await response(service, context := Context(), page_bytes=100_000, page_token=token, **fields)
            assert answer.ByteSize() <= 100_000
            found += [each.worker_id for each in answer.instances]
            left_out += context.trailing.values()
            await store.update("s", found[0], _READY, None, "")  # a heartbeat changes no order
            token = answer.next_page_token
            if not token:
                break
        return found, left_out

    run(scenario)


def test_long_lists_let_others_run() -> None:
    """40,000 sources: between two turns of another task, a list takes milliseconds of CPU time."""
    store = MemoryStore()
    service = P2pService(store, 90)
    turns: list[float] = []

    async def scenario() -> None:
        for number in range(40_000):
            await store.publish(source(f"w-{number}", topology={"rack": "7", "mx_endpoint": "10.0.0.1:6555"}))
        listing = [asyncio.ensure_future(response(service)) for _ in range(2)]
        before = time.thread_time()
        while not all(each.done() for each in listing):
            await asyncio.sleep(0)
            now = time.thread_time()
            turns.append(now - before)
            before = now
        for each in listing:
            assert 40_000 == len(each.result().instances)

    run(scenario)
    turns.sort()
    assert turns[int(len(turns) * 0.99)] < 0.010
    assert len(turns) > 200


class _Damaged(MemoryStore):
    async def list(self, query: SourceQuery) -> Listing:
        return attrs.evolve(await super().list(query), unreadable=2)

    async def get(self, source_id: str, worker_id: str) -> StoredSource | None:
        if worker_id == "damaged":
            raise UnreadableRecordError(source_id, worker_id)
        return attrs.evolve(source("w"), worker=b"\xff")


def test_records_that_cannot_be_read() -> None:
    """They are left out and counted, whether the store or this service cannot read them."""
    store = _Damaged()
    metrics = SourceServiceMetrics(registry := CollectorRegistry())
    service = P2pService(store, 90, metrics=metrics)

    async def scenario() -> None:
        await store.publish(source("w"))

        assert ["w"] == await listed(service)
        for worker_id in ("damaged", "w"):
            request = p2p_pb2.GetMetadataRequest(mx_source_id="s", worker_id=worker_id)
            assert not (await service.get_metadata(request, Context())).found  # type: ignore[arg-type]

    run(scenario)
    assert 4.0 == registry.get_sample_value("mx_server_unreadable_records_total")


# -- both lists of tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [("tensors",), ("tensor_source",), ("tensors", "tensor_source")])
def test_both_lists_are_filled(written: tuple[str, ...]) -> None:
    """Whichever the publisher wrote; and one of two equal ones is stored."""
    store = MemoryStore()
    service = P2pService(store, 90)
    fields: dict[str, Any] = {"tensors": _TENSORS, "tensor_source": p2p_pb2.TensorSource(tensors=_TENSORS)}
    request = p2p_pb2.PublishMetadataRequest(
        identity={"model_name": "m"}, worker_id="w", worker={name: fields[name] for name in written}
    )

    async def scenario() -> None:
        published = await service.publish_metadata(request, Context())  # type: ignore[arg-type]
        stored = await store.get(published.mx_source_id, "w")
        ids = p2p_pb2.GetMetadataRequest(mx_source_id=published.mx_source_id, worker_id="w")
        answer = await service.get_metadata(ids, Context())  # type: ignore[arg-type]

        assert published.success
        assert _TENSORS == list(answer.worker.tensors) == list(answer.worker.tensor_source.tensors)
        assert stored is not None
        assert 1 == stored.worker.count(_TENSORS[0].SerializeToString())

    run(scenario)


def test_an_artifact_stays_one() -> None:
    """Its record gets no list of tensors beside it, and lists that differ stay as they were written."""
    store = MemoryStore()
    service = P2pService(store, 90)
    artifact = p2p_pb2.WorkerMetadata(artifact_source=p2p_pb2.ArtifactSource(artifact_id="a"))
    different = p2p_pb2.WorkerMetadata(tensors=_TENSORS, tensor_source=p2p_pb2.TensorSource(tensors=_TENSORS * 2))

    async def scenario() -> None:
        for worker in (artifact, different):
            request = p2p_pb2.PublishMetadataRequest(identity={"model_name": "m"}, worker_id="w", worker=worker)
            published = await service.publish_metadata(request, Context())  # type: ignore[arg-type]
            ids = p2p_pb2.GetMetadataRequest(mx_source_id=published.mx_source_id, worker_id="w")
            answer = (await service.get_metadata(ids, Context())).worker  # type: ignore[arg-type]
            answer.ClearField("updated_at")
            assert worker == answer

    run(scenario)
