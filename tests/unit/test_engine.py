"""The engine: concurrency, order, the account, and how a load ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from modelexpress_core.checkpoint import CheckpointFile
from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    IncompleteLoadError,
    SourceChangedError,
    UnavailableError,
)
from modelexpress_core.fetch import FetchEngine, Ledger, Range, Segment, Ticket
from modelexpress_core.fetch.concurrency import FixedConcurrency
from modelexpress_core.fetch.staging import StagingPool
from modelexpress_core.providers import StorageCapabilities
from modelexpress_core.settings import LoadSettings

CONTENT = bytes(index * 7 % 251 for index in range(1 << 16))
FILE = CheckpointFile("dir/a.safetensors", "a.safetensors", len(CONTENT), "v1", 0)


class Blocks:
    """A storage whose reads wait until they are let go, and which fails those that its ``faults`` name by offset."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.started = threading.Semaphore(0)
        self.lock = threading.Lock()
        self.under_way = 0
        self.most = 0
        self.order: list[int] = []
        self.faults: dict[int, BaseException] = {}
        self.closed = False

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        yield from ()

    def stat(self, path: str) -> ObjectInfo:
        return ObjectInfo(path, len(CONTENT), "v1")

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        assert (path, version) == (FILE.path, FILE.version)
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            self.order.append(offset)
        self.started.release()
        try:
            if offset in self.faults:
                raise self.faults[offset]
            self.let_go.wait(30)
            if self.closed:
                raise BackendError("closed")
            buffer[:] = CONTENT[offset : offset + len(buffer)]
            return len(buffer)
        finally:
            with self.lock:
                self.under_way -= 1

    def close(self) -> None:
        self.closed = True
        self.let_go.set()


def direct(offset: int, length: int) -> tuple[Range, Ticket, bytearray]:
    """A range that is read directly into its memory."""
    memory, ticket = bytearray(length), Ticket()
    return Range(FILE, offset, length, [Segment(offset, length, ticket, memory=memoryview(memory))]), ticket, memory


def engine(storage: Blocks, reads: int = 4, **settings: int) -> FetchEngine:
    return FetchEngine(storage, LoadSettings(**settings), StorageCapabilities(), limit=FixedConcurrency(reads))


def test_bytes_go_straight_to_the_memory_that_was_given() -> None:
    """The very memory is filled, and the account says so."""
    storage = Blocks()
    storage.let_go.set()
    fetch = engine(storage)
    ranges = [direct(offset, 1000) for offset in range(0, 10_000, 1000)]

    fetch.submit([[range_] for range_, _, _ in ranges])
    fetch.finish()

    assert [bytes(memory) for _, _, memory in ranges] == [CONTENT[o : o + 1000] for o in range(0, 10_000, 1000)]
    assert all(ticket.done for _, ticket, _ in ranges)
    assert (fetch.ledger.planned_bytes, fetch.ledger.arrived_bytes, fetch.ledger.requests) == (10_000, 10_000, 10)


class Rechecked(Blocks):
    """A storage that compares versions again; its file may have changed."""

    def __init__(self, *, changed: bool = False) -> None:
        super().__init__()
        self.let_go.set()
        self.changed = changed
        self.checked: list[tuple[str, str, int]] = []

    def check_unchanged(self, path: str, *, version: str) -> None:
        self.checked.append((path, version, self.under_way))
        if self.changed:
            raise SourceChangedError("it changed", uri=path)


@pytest.mark.parametrize("changed", [False, True])
def test_versions_are_compared_once_more_at_the_end(changed: bool) -> None:
    """Once for each file, when no read is under way any more; a change fails the load."""
    storage = Rechecked(changed=changed)
    capabilities = StorageCapabilities(recheck=True)
    fetch = FetchEngine(storage, LoadSettings(), capabilities, limit=FixedConcurrency(4))
    fetch.submit([[direct(offset, 1000)[0]] for offset in range(0, 10_000, 1000)])

    if changed:
        with pytest.raises(SourceChangedError) as caught:
            fetch.finish()
        assert fetch.abort(caught.value)
    else:
        fetch.finish()

    assert [(FILE.path, "v1", 0)] == storage.checked


def test_versions_are_not_compared_again_unless_the_storage_says_so() -> None:
    """The method alone is no promise."""
    storage = Rechecked(changed=True)
    fetch = engine(storage)
    fetch.submit([[direct(0, 1000)[0]]])

    fetch.finish()

    assert [] == storage.checked


def test_segments_of_one_range_share_one_read() -> None:
    """Memory, delivery, a gap and an overlap are all served from one staged read."""
    storage = Blocks()
    storage.let_go.set()
    fetch = engine(storage)
    memory, delivered, tickets = bytearray(10), bytearray(), [Ticket(), Ticket()]
    segments = [
        Segment(100, 10, tickets[0], memory=memoryview(memory)),
        Segment(105, 20, tickets[1], consume=delivered.extend),
    ]

    fetch.submit([[Range(FILE, 90, 100, segments)]])
    fetch.finish()

    assert bytes(memory) == CONTENT[100:110]
    assert bytes(delivered) == CONTENT[105:125]
    assert storage.order == [90]


def test_no_more_reads_are_under_way_than_the_limit_allows() -> None:
    """The limit is reached, and not exceeded."""
    storage = Blocks()
    fetch = engine(storage, reads=3)
    fetch.submit([[direct(offset * 100, 100)[0]] for offset in range(20)])
    for _ in range(3):
        assert storage.started.acquire(timeout=30)

    reached = storage.under_way
    storage.let_go.set()
    fetch.finish()

    assert reached == 3
    assert storage.most == 3
    assert fetch.ledger.most_in_flight == 3


def test_urgent_ranges_go_first() -> None:
    """Urgent ranges overtake ranges that were queued before."""
    storage = Blocks()
    fetch = engine(storage, reads=1)
    fetch.submit([[direct(0, 10)[0]]])
    assert storage.started.acquire(timeout=30)
    fetch.submit([[direct(1000, 10)[0]], [direct(2000, 10)[0]]])
    fetch.submit([[direct(3000, 10)[0]]], urgent=True)

    storage.let_go.set()
    fetch.finish()

    assert storage.order == [0, 3000, 1000, 2000]


def test_waiting_for_one_ticket_does_not_wait_for_the_rest() -> None:
    """A ticket is complete when its own segments have arrived."""
    storage = Blocks()
    fetch = engine(storage, reads=2)
    first, ticket, memory = direct(0, 100)
    storage.let_go.set()
    fetch.submit([[first]])

    fetch.wait([ticket])
    storage.let_go.clear()
    fetch.submit([[direct(500, 100)[0]]])

    assert bytes(memory) == CONTENT[:100]
    storage.let_go.set()
    fetch.finish()


def test_the_first_permanent_error_ends_the_load() -> None:
    """What has not begun never begins, the storage is closed, and waiters get the error."""
    storage = Blocks()
    storage.faults[0] = AccessDeniedError("no")
    fetch = engine(storage, reads=2)
    ranges = [direct(offset * 1000, 1000) for offset in range(60)]
    fetch.submit([[range_] for range_, _, _ in ranges])

    with pytest.raises(AccessDeniedError):
        fetch.wait([ticket for _, ticket, _ in ranges])
    with pytest.raises(AccessDeniedError):
        fetch.submit([[direct(0, 10)[0]]])
    with pytest.raises(AccessDeniedError):
        fetch.finish()

    assert fetch.abort(RuntimeError("later")) is True
    assert storage.closed
    assert len(storage.order) < 60


def test_an_aborted_load_leaves_no_thread_that_writes() -> None:
    """abort returns when the last read that was under way has ended, so the memory is the caller's again."""
    storage = Blocks()
    fetch = engine(storage, reads=4)
    fetch.submit([[direct(offset * 1000, 1000)[0]] for offset in range(20)])
    for _ in range(4):
        assert storage.started.acquire(timeout=30)

    stopped = fetch.abort(KeyboardInterrupt())

    assert stopped is True
    assert storage.under_way == 0
    assert len(storage.order) == 4


def test_an_abort_interrupts_waits_between_tries() -> None:
    """A read that waits to be tried again does not hold up the end of the load."""
    storage = Blocks()
    storage.let_go.set()
    storage.faults[0] = UnavailableError("busy", retry_after_seconds=60.0)
    fetch = engine(storage)
    fetch.submit([[direct(0, 100)[0]]])
    assert storage.started.acquire(timeout=30)
    begun = time.monotonic()

    fetch.abort(KeyboardInterrupt())

    assert time.monotonic() - begun < 30


def test_an_error_in_a_delivery_ends_the_load() -> None:
    """Bytes that cannot be put in place are not counted as arrived."""
    storage = Blocks()
    storage.let_go.set()
    fetch = engine(storage)

    def refuse(_part: memoryview) -> None:
        raise ValueError("no room")

    fetch.submit([[Range(FILE, 0, 10, [Segment(0, 10, Ticket(), consume=refuse)])]])

    with pytest.raises(ValueError, match="no room"):
        fetch.finish()
    fetch.abort(ValueError("no room"))

    assert fetch.ledger.arrived_bytes == 0


def test_the_ledger_refuses_a_load_that_misses_bytes() -> None:
    """Planned and arrived bytes must agree even if no failure was noticed."""
    ledger = Ledger()
    ledger.plan(100)
    ledger.begin(1)
    ledger.end(60)

    with pytest.raises(IncompleteLoadError, match="40 of 100"):
        ledger.check()


def test_staging_memory_is_bounded_and_used_again() -> None:
    """Never more than the budget is allocated; who finds nothing free waits for a buffer to come back."""
    made: list[int] = []

    def allocate(length: int) -> memoryview:
        made.append(length)
        return memoryview(bytearray(length))

    pool = StagingPool(300, 100, allocate)
    holding, release = threading.Barrier(4), threading.Event()

    def hold() -> None:
        with pool.borrow(50):
            holding.wait(30)
            release.wait(30)

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    holding.wait(30)
    fourth = threading.Thread(target=lambda: pool.borrow(100).__enter__())
    fourth.start()
    fourth.join(0.2)
    blocked = fourth.is_alive()
    release.set()
    for thread in (*threads, fourth):
        thread.join(30)

    assert blocked
    assert made == [100, 100, 100]


def test_staging_refuses_what_no_buffer_holds() -> None:
    """A range larger than a buffer is a fault of the plan, not a reason to allocate more."""
    with pytest.raises(ValueError, match="do not fit"), StagingPool(100, 50).borrow(51):
        pass


def test_threads_end_with_the_load() -> None:
    """A process that loads often does not collect threads."""
    before = threading.active_count()
    for _ in range(5):
        storage = Blocks()
        storage.let_go.set()
        fetch = engine(storage)
        fetch.submit([[direct(0, 100)[0]], [direct(100, 100)[0]]])
        fetch.finish()

    assert threading.active_count() == before


def test_staging_buffers_come_from_where_they_are_asked_for() -> None:
    """Devices need pinned buffers; existing buffers stay in use."""
    pool, made = StagingPool(3000, 1000), []

    def allocate(length: int) -> memoryview:
        made.append(length)
        return memoryview(bytearray(length))

    with pool.borrow(10):
        pool.allocate_with(allocate)
        with pool.borrow(20), pool.borrow(30):
            pass
    with pool.borrow(1000):
        pass

    assert [1000, 1000] == made
