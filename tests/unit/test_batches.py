"""Storages with their own engine: what they are asked, what becomes of their completions, and what goes wrong."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import save

import modelexpress_core as mx
from modelexpress_core.checkpoint import CheckpointFile
from modelexpress_core.contracts.storage import Completion, ObjectInfo, ReadRequest
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    ThrottledError,
    UnavailableError,
)
from modelexpress_core.fetch import FetchEngine, Range, RetryBudget, RetryingStorage, RetryPolicy, Segment, Ticket
from modelexpress_core.fetch.concurrency import FixedConcurrency
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from modelexpress_core.settings import LoadSettings
from modelexpress_core.storage.memory import MemoryStorage

PATH = "model/model.safetensors"
CAPABILITIES = StorageCapabilities(read_batch=True, stat_digests=True, concurrency=2, most_concurrency=2)
STATE = {
    "small": torch.arange(3, dtype=torch.int64),
    "large": torch.arange(300_000, dtype=torch.int32).view(300, 1000),
    "other": torch.arange(90_000, dtype=torch.float32),
}


class Batching:
    """Objects in memory that are read in batches, with faults: the errors of a request, by its offset, in turn."""

    def __init__(self, content: bytes, digests: dict[str, str] | None = None) -> None:
        self.inner = MemoryStorage()
        self.version = self.inner.put(PATH, content).version
        self.digests = digests or {}
        self.faults: dict[int, list[BackendError]] = {}
        self.damage_one = False
        self.batches: list[list[int]] = []
        self.read_into_calls = 0
        self.calls = Counter[int]()
        self.closed = threading.Event()
        self.ended = 0
        self.answers: Callable[[Sequence[ReadRequest]], Iterator[Completion]] = self.answer
        self.lock = threading.Lock()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def stat(self, path: str) -> ObjectInfo:
        return attrs.evolve(self.inner.stat(path), digests=self.digests)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        self.read_into_calls += 1
        return self.inner.read_into(path, offset, buffer, version=version)

    def read_batch(self, requests: Sequence[ReadRequest]) -> Generator[Completion, None, None]:
        with self.lock:
            self.batches.append([request.offset for request in requests])
            self.calls.update(request.offset for request in requests)
        try:
            yield from self.answers(requests)
        finally:
            self.ended += 1

    def answer(self, requests: Sequence[ReadRequest]) -> Iterator[Completion]:
        for index, request in reversed(list(enumerate(requests))):
            faults = self.faults.get(request.offset)
            if faults:
                yield Completion(index, faults.pop(0))
                continue
            self.inner.read_into(request.path, request.offset, request.buffer, version=request.version)
            if self.damage_one:
                self.damage_one = False
                request.buffer[0] ^= 1
            yield Completion(index)

    def close(self) -> None:
        self.closed.set()


CONTENT = os.urandom(1 << 16)
FILE = CheckpointFile(PATH, "model.safetensors", len(CONTENT), "1", 0)


def direct(offset: int, length: int) -> tuple[Range, bytearray]:
    memory = bytearray(length)
    return Range(FILE, offset, length, [Segment(offset, length, Ticket(), memory=memoryview(memory))]), memory


def staged(offset: int, length: int) -> tuple[Range, bytearray]:
    memory = bytearray(length)

    def consume(content: memoryview) -> None:
        memory[:] = content

    return Range(FILE, offset, length, [Segment(offset, length, Ticket(), consume=consume)]), memory


def engine(storage: Batching, reads: int = 1, **settings: Any) -> FetchEngine:
    return FetchEngine(storage, LoadSettings(**settings), CAPABILITIES, limit=FixedConcurrency(reads))


@pytest.fixture
def storage() -> Batching:
    return Batching(CONTENT)


def test_the_queue_is_read_in_few_batches(storage: Batching) -> None:
    """One thread hands over what waits, and no range is read in another way."""
    fetch = engine(storage)
    ranges = [direct(offset, 1000) for offset in range(0, 60_000, 1000)]

    fetch.submit([[range_] for range_, _ in ranges])
    fetch.finish()

    assert [CONTENT[offset : offset + 1000] for offset in range(0, 60_000, 1000)] == [bytes(m) for _, m in ranges]
    assert [[*range(0, 60_000, 1000)]] == storage.batches
    assert 0 == storage.read_into_calls
    assert 60_000 == fetch.ledger.arrived_bytes
    assert all(range_.segments[0].ticket.done for range_, _ in ranges)


def test_staged_ranges_share_the_buffers(storage: Batching) -> None:
    """More ranges than buffers: they are read some at a time, by several threads, and each gets its own bytes."""
    fetch = engine(storage, reads=3, staging_bytes=4 << 20, chunk_bytes=1 << 20)
    ranges = [(staged if offset % 2000 else direct)(offset, 1000) for offset in range(0, 60_000, 1000)]

    for range_, _ in ranges:
        fetch.submit([[range_]])
    fetch.finish()

    assert [CONTENT[offset : offset + 1000] for offset in range(0, 60_000, 1000)] == [bytes(m) for _, m in ranges]
    assert set(storage.calls.values()) == {1}
    assert max(len([offset for offset in batch if offset % 2000]) for batch in storage.batches) <= 2


def test_only_what_failed_is_read_again(storage: Batching) -> None:
    """A request that failed for a moment is sent again, without those that arrived."""
    storage.faults = {2000: [UnavailableError("once"), UnavailableError("twice")]}
    fetch = engine(storage)
    ranges = [direct(offset, 1000) for offset in range(0, 5000, 1000)]

    fetch.submit([[range_] for range_, _ in ranges])
    fetch.finish()

    assert [[0, 1000, 2000, 3000, 4000], [2000], [2000]] == storage.batches
    assert [CONTENT[offset : offset + 1000] for offset in range(0, 5000, 1000)] == [bytes(m) for _, m in ranges]
    assert 2 == fetch.ledger.retries


def test_a_final_error_ends_the_load(storage: Batching) -> None:
    """The batch is closed before the error reaches the caller, and nothing is sent again."""
    storage.faults = {4000: [AccessDeniedError("no")]}
    fetch = engine(storage)
    fetch.submit([[direct(offset, 1000)[0]] for offset in range(0, 5000, 1000)])

    with pytest.raises(AccessDeniedError) as caught:
        fetch.finish()

    assert fetch.abort(caught.value)
    assert (1, 1) == (len(storage.batches), storage.ended)
    assert storage.closed.is_set()


def test_requests_that_keep_failing_give_up(storage: Batching) -> None:
    """The number of attempts is that of any read, and the error has it."""
    storage.faults = {0: [UnavailableError("down") for _ in range(9)]}
    fetch = engine(storage, retry_attempts=3)
    fetch.submit([[direct(0, 1000)[0]]])

    with pytest.raises(UnavailableError) as caught:
        fetch.finish()

    assert fetch.abort(caught.value)
    assert 3 == len(storage.batches) == caught.value.attempts


def retrying(storage: Any, **options: Any) -> RetryingStorage:
    return RetryingStorage(storage, RetryPolicy(base_seconds=0.001), RetryBudget(60.0), **options)


def requests(*offsets: int) -> list[ReadRequest]:
    return [ReadRequest(PATH, offset, memoryview(bytearray(100)), "1") for offset in offsets]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ([0, 1], "no completion of 1 of 3 requests"),
        ([], "no completion of 3 of 3 requests"),
        ([0, 1, 1, 2], "a completion of request 1, which is not open"),
        ([0, 1, 3, 2], "a completion of request 3, which is not open"),
        ([-1, 0, 1, 2], "a completion of request -1, which is not open"),
    ],
)
def test_wrong_completions_are_the_fault_of_the_plugin(storage: Batching, answer: list[int], complaint: str) -> None:
    """Nothing counts as arrived that was not, and the message names the plugin's authors."""
    storage.answers = lambda _requests: map(Completion, answer)

    with pytest.raises(BackendError, match=f"read_batch yielded {complaint}") as caught:
        retrying(storage).read_batch(requests(0, 100, 200), lambda _index: None)

    assert "plugin's authors" in str(caught.value)
    assert not caught.value.retryable
    assert 1 == len(storage.batches)


def test_errors_of_the_plugin_itself_are_named(storage: Batching) -> None:
    """An error that the plugin did not translate ends the load, with its kind."""

    def fail(_requests: Sequence[ReadRequest]) -> Iterator[Completion]:
        raise KeyError("slot")
        yield

    storage.answers = fail

    with pytest.raises(BackendError, match="did not translate KeyError"):
        retrying(storage).read_batch(requests(0), lambda _index: None)


def test_throttling_is_noticed_among_other_errors(storage: Batching) -> None:
    """The limit of reads is lowered if any request of the batch was throttled."""
    storage.faults = {
        0: [UnavailableError("down")],
        100: [ThrottledError("slow down")],
        200: [UnavailableError("down")],
    }
    failures: list[BackendError] = []
    arrived: list[int] = []

    retrying(storage, on_failure=failures.append).read_batch(requests(0, 100, 200, 300), arrived.append)

    assert [ThrottledError] == [type(error) for error in failures]
    assert [0, 1, 2, 3] == sorted(arrived)


def test_errors_while_bytes_are_used_end_the_batch(storage: Batching) -> None:
    """The error of the caller stays what it is, and the batch is closed."""

    def arrived(_index: int) -> None:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        retrying(storage).read_batch(requests(0, 100), arrived)

    assert 1 == storage.ended


def test_a_batch_under_way_ends_with_the_load(storage: Batching) -> None:
    """``abort`` closes the storage and waits for the batch; what is queued is not read."""
    started = threading.Event()

    def stall(requests: Sequence[ReadRequest]) -> Iterator[Completion]:
        started.set()
        assert storage.closed.wait(30)
        raise BackendError("the storage was closed")
        yield

    storage.answers = stall
    fetch = engine(storage)
    ranges = [direct(0, 1000), direct(1000, 1000)]
    fetch.submit([[ranges[0][0]]])
    assert started.wait(30)
    fetch.submit([[ranges[1][0]]])

    assert fetch.abort(RuntimeError("enough"))

    assert (1, 1) == (len(storage.batches), storage.ended)
    assert not any(bytes(1000) != bytes(memory) for _, memory in ranges)


class Plugin:
    def __init__(self, storage: Batching) -> None:
        self.storage = storage

    @mx.hookimpl
    def mx_register_storages(self) -> list[StorageProvider]:
        return [StorageProvider("batches", ("batches",), lambda uri, env: self.storage, capabilities=CAPABILITIES)]


def report_of(storage: Batching) -> mx.LoadReport:
    """The report of a load of everything, whose tensors are right."""
    plugins = mx.PluginManager()
    plugins.register(Plugin(storage), name="mx-batches")
    target = {name: torch.empty_like(tensor) for name, tensor in STATE.items()}
    settings = {"MX_CHUNK_BYTES": "65536"}
    report = mx.load_into(target, "batches://host/model", plugins=plugins, environ=settings)
    assert all(torch.equal(STATE[name], target[name]) for name in STATE)
    return report


def test_a_checkpoint_loads_and_is_verified() -> None:
    """Headers are read one by one, tensors in batches; the digest of the file is compared."""
    content = save(STATE)
    storage = Batching(content, {"sha256": hashlib.sha256(content).hexdigest()})

    report = report_of(storage)

    assert (1, 0) == (report.verified["digests"], report.bytes_reread)
    assert len(storage.batches) < sum(map(len, storage.batches))


def test_damaged_bytes_are_read_again() -> None:
    """A byte that a batch damaged is found by the digest, and replaced by what ``read_into`` returns."""
    content = save(STATE)
    storage = Batching(content, {"crc32": f"{zlib.crc32(content):08x}"})
    storage.damage_one = True

    report = report_of(storage)

    assert not storage.damage_one
    assert 1 == report.verified["digests"]
    assert report.bytes_reread


def test_batches_and_runs_exclude_each_other() -> None:
    """One way to read: a record that declares two is refused."""
    with pytest.raises(ValueError, match="exclude each other"):
        StorageCapabilities(read_batch=True, read_runs=True)
