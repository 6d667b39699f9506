"""How long silence may last, and what happens to reads that never end."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence

import pytest

from modelexpress_core.checkpoint import CheckpointFile
from modelexpress_core.contracts.storage import Completion, ObjectInfo, ReadRequest
from modelexpress_core.errors import BackendError, DeadlineError, StillArrivingError
from modelexpress_core.fetch import FetchEngine, Range, Segment, Ticket
from modelexpress_core.fetch.concurrency import FixedConcurrency
from modelexpress_core.fetch.stalls import Patience
from modelexpress_core.providers import StorageCapabilities
from modelexpress_core.settings import LoadSettings

FILE = CheckpointFile("a.safetensors", "a.safetensors", 1 << 20, "v1", 0)


def test_nothing_is_concluded_from_few_reads() -> None:
    """Until then the time is the one that the user set."""
    patience = Patience(30.0)

    seconds = [patience.completed(0.1) for _ in range(8)]

    assert [30.0] * 7 == seconds[:7]
    assert seconds[7] == 2.0


def test_patience_follows_the_slowest_of_the_last_reads() -> None:
    """Three times as long as it took as a whole, never longer than the user set."""
    patience = Patience(30.0)

    times = [patience.completed(seconds) for seconds in [1.0] * 8 + [4.0] + [20.0] + [0.1] * 32]

    assert times[7:10] == [3.0, 12.0, 30.0]
    assert times[-1] == 2.0


def test_where_everything_stalls_patience_grows_to_what_the_user_set_and_comes_back() -> None:
    """A server that restarts is waited for; afterwards a stalled read costs little again."""
    patience = Patience(30.0)
    for _ in range(8):
        patience.completed(0.1)

    growing = [patience.stalled() for _ in range(6)]
    falling = [patience.completed(0.1) for _ in range(6)]

    assert growing == [4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert falling[-1] == 2.0
    assert falling == sorted(falling, reverse=True)


class Silent:
    """A patient storage of whose reads some never get a byte."""

    def __init__(self, *stalls: int) -> None:
        self.patience_seconds = 0.0
        self.seen: list[float] = []
        self.stalls = set(stalls)
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.reads = 0

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        yield from ()

    def stat(self, path: str) -> ObjectInfo:
        return ObjectInfo(path, FILE.size, "v1")

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        with self.lock:
            number = self.reads
            self.reads += 1
            self.seen.append(self.patience_seconds)
        if number in self.stalls:
            if self.closed.wait(self.patience_seconds):
                raise BackendError("closed")
            raise DeadlineError("silence", uri=path, operation="read")
        buffer[:] = bytes(len(buffer))
        return len(buffer)

    def close(self) -> None:
        self.closed.set()


def ranges(count: int, length: int = 1000) -> list[list[Range]]:
    made = []
    for number in range(count):
        segment = Segment(number * length, length, Ticket(), memory=memoryview(bytearray(length)))
        made.append([Range(FILE, number * length, length, [segment])])
    return made


@pytest.mark.slow
def test_a_stalled_read_costs_seconds_once_it_is_known_how_long_reads_take() -> None:
    """The engine lowers the patience of the storage, and the read is sent again."""
    storage = Silent(50)
    capabilities = StorageCapabilities(patience=True)
    engine = FetchEngine(storage, LoadSettings(), capabilities, limit=FixedConcurrency(2))
    begun = time.monotonic()

    engine.submit(ranges(100))
    engine.finish()

    assert 1.5 < time.monotonic() - begun < 10
    assert (storage.seen[0], storage.seen[49], storage.seen[-1]) == (30.0, 2.0, 4.0)  # the last one is sent again
    assert (engine.ledger.retries, engine.ledger.arrived_bytes) == (1, 100_000)


def test_a_storage_that_is_not_patient_is_not_touched() -> None:
    """Attributes are set where the capability is declared, and nowhere else."""
    storage = Silent()
    engine = FetchEngine(storage, LoadSettings(), StorageCapabilities(), limit=FixedConcurrency(2))

    engine.submit(ranges(20))
    engine.finish()

    assert {0.0} == set(storage.seen)


class Hung(Silent):
    """A storage whose client never notices that no answer comes, until it is closed."""

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        self.closed.wait()
        raise BackendError("closed")

    def read_batch(self, requests: Sequence[ReadRequest]) -> Generator[Completion, None, None]:
        self.closed.wait()
        raise BackendError("closed")
        yield


class Arriving(Silent):
    """A storage whose server gets the bytes for longer than a read may take."""

    there_at = 0.0

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        now = time.monotonic()
        if now < self.there_at:
            raise StillArrivingError("not there yet", present_bytes=int(now * 1000), retry_after_seconds=0.05)
        return len(buffer)


@pytest.mark.slow
def test_a_read_of_bytes_that_still_arrive_is_not_hung() -> None:
    """It may take any time, as long as bytes arrive at the server, and counts as no failure."""
    storage = Arriving()
    storage.there_at = time.monotonic() + 3.0
    engine = FetchEngine(storage, LoadSettings(stall_seconds=0.1), StorageCapabilities(), limit=FixedConcurrency(2))

    engine.submit(ranges(1))
    engine.finish()

    assert 1000 == engine.ledger.arrived_bytes


@pytest.mark.slow
@pytest.mark.parametrize("batch", [False, True])
def test_a_read_that_never_ends_ends_the_load(batch: bool) -> None:
    """With an error that names it; no thread waits for ever."""
    engine = FetchEngine(
        Hung(),
        LoadSettings(stall_seconds=0.1),
        StorageCapabilities(read_batch=batch),
        limit=FixedConcurrency(2),
        uri_of=lambda path: f"hung://host/{path}",
    )
    engine.submit(ranges(1))

    with pytest.raises(DeadlineError) as error:
        engine.finish()

    assert "could not read bytes 0-999 of hung://host/a.safetensors: no answer for" in str(error.value)
    assert "MX_STALL_SECONDS" in str(error.value)
    assert engine.abort(error.value)
