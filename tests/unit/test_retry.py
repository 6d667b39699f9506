"""Trying again: when, how long, and from where."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    SourceChangedError,
    StillArrivingError,
    UnavailableError,
)
from modelexpress_core.fetch import RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.fetch.retry import LoadCancelledError

CONTENT = bytes(range(256)) * 8


class Scripted:
    """A storage that does, call by call, what its script says: raise, or return that many bytes."""

    def __init__(self, script: list[BackendError | int], size: int = len(CONTENT)) -> None:
        self.script = script
        self.size = size
        self.calls: list[tuple[int, int]] = []

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        yield ObjectInfo("a", 1)
        step = self.script.pop(0) if self.script else 0
        if isinstance(step, BackendError):
            raise step
        yield ObjectInfo("b", 1)

    def stat(self, path: str) -> ObjectInfo:
        step = self.script.pop(0) if self.script else 0
        if isinstance(step, BackendError):
            raise step
        return ObjectInfo(path, self.size)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        self.calls.append((offset, len(buffer)))
        step = self.script.pop(0) if self.script else len(buffer)
        if isinstance(step, BackendError):
            raise step
        buffer[:step] = CONTENT[offset : offset + step]
        return step

    def close(self) -> None:
        pass


def longest(low: float, high: float) -> float:
    """In place of a random draw: always the bound, shortened a thousandfold."""
    return low + (high - low) / 1000


def retrying(
    storage: Scripted,
    *,
    attempts: int = 4,
    budget: float = 60.0,
    cancelled: threading.Event | None = None,
    on_retry: Callable[[], None] = lambda: None,
    uniform: Callable[[float, float], float] = longest,
) -> RetryingStorage:
    return RetryingStorage(
        storage,
        RetryPolicy(attempts=attempts),
        RetryBudget(budget),
        cancelled=cancelled,
        on_retry=on_retry,
        uniform=uniform,
    )


def read(storage: RetryingStorage, offset: int = 0, length: int = 100) -> bytes:
    buffer = bytearray(length)
    storage.read_into("file", offset, memoryview(buffer), version=None)
    return bytes(buffer)


def test_a_read_resumes_at_the_first_missing_byte() -> None:
    """What arrived before a break is kept, and only the rest is asked for again."""
    storage = Scripted([30, UnavailableError("reset"), 20])

    content = read(retrying(storage), offset=5)

    assert content == CONTENT[5:105]
    assert storage.calls == [(5, 100), (35, 70), (35, 70), (55, 50)]


def test_progress_starts_the_count_of_attempts_anew() -> None:
    """A read that keeps advancing is never given up, however often it breaks."""
    script: list[BackendError | int] = [step for _ in range(20) for step in (UnavailableError("reset"), 5)]
    storage = Scripted(script)

    assert read(retrying(storage, attempts=2)) == CONTENT[:100]


def test_attempts_without_progress_are_bounded_and_counted_in_the_message() -> None:
    """The error that is raised in the end says how often the read was tried."""
    errors: list[BackendError | int] = [
        UnavailableError("reset", uri="x://y", operation="read bytes 0-99") for _ in range(9)
    ]

    with pytest.raises(UnavailableError, match="after 4 attempts") as caught:
        read(retrying(Scripted(errors), attempts=4))

    assert caught.value.attempts == 4
    assert len(errors) == 9 - 4


def arriving(present_bytes: int) -> StillArrivingError:
    return StillArrivingError("not there yet", present_bytes=present_bytes, retry_after_seconds=0.001)


def test_bytes_that_still_arrive_are_waited_for_without_end() -> None:
    """It spends neither attempts nor waiting time, as long as more of them arrive."""
    script: list[BackendError | int] = [arriving(present) for present in range(100)]
    storage = Scripted(script)

    assert read(retrying(storage, attempts=1, budget=0)) == CONTENT[:100]
    assert len(storage.calls) == 101


def test_bytes_that_arrive_no_more_end_the_wait() -> None:
    """After a time in which their number was the same, the attempts are those of other errors."""
    storage = RetryingStorage(
        Scripted([arriving(7) for _ in range(1000)]), RetryPolicy(attempts=1, arrival_seconds=0.05), RetryBudget(0)
    )

    with pytest.raises(StillArrivingError, match="not there yet") as caught:
        read(storage)

    assert 7 == caught.value.present_bytes


def test_a_wait_for_arriving_bytes_ends_with_the_load() -> None:
    """Also where the server asks for a long one."""
    cancelled = threading.Event()
    error = StillArrivingError("not there yet", present_bytes=1, retry_after_seconds=3600)
    threading.Timer(0.05, cancelled.set).start()

    with pytest.raises(LoadCancelledError):
        read(retrying(Scripted([error]), cancelled=cancelled))


@pytest.mark.parametrize("error", [AccessDeniedError("no"), SourceChangedError("other"), BackendError("broken")])
def test_permanent_errors_are_raised_at_once(error: BackendError) -> None:
    """A retry cannot help, so there is no wait."""
    storage = Scripted([error, 100])

    with pytest.raises(type(error)):
        read(retrying(storage))

    assert len(storage.calls) == 1


def test_the_budget_is_shared_and_bounds_all_waiting() -> None:
    """Many reads against a dead storage wait no longer in all than the budget allows."""
    drawn: list[float] = []

    def uniform(_low: float, high: float) -> float:
        drawn.append(high)
        return 0.015625

    budget = RetryBudget(0.0625)
    storage = RetryingStorage(
        Scripted([UnavailableError("down") for _ in range(1000)]), RetryPolicy(attempts=500), budget, uniform=uniform
    )
    begun = time.monotonic()

    for _ in range(3):
        with pytest.raises(UnavailableError):
            read(storage)

    assert len(drawn) == 4 + 3  # four waits fit the budget; each read then fails at its next wish to wait
    assert time.monotonic() - begun < 10


def test_waits_double_up_to_the_cap_and_are_drawn_between_zero_and_the_bound() -> None:
    """Full jitter: any wait from nothing to the bound, and the bound grows."""
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return low

    storage = Scripted([UnavailableError("down") for _ in range(9)])

    read(retrying(storage, attempts=20, uniform=uniform))

    assert bounds == [(0.0, b) for b in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0)]


def test_the_other_sides_wish_is_honoured() -> None:
    """Where the answer says how long to wait, the wait is at least that."""
    policy = RetryPolicy()

    assert policy.delay(1, 7.5, lambda _low, _high: 0.0) == 7.5
    assert policy.delay(1, 7.5, lambda _low, high: high) == 7.6


def test_cancelling_ends_a_wait_at_once() -> None:
    """A load that failed elsewhere does not sit out the waits of its other reads."""
    cancelled = threading.Event()
    storage = retrying(
        Scripted([UnavailableError("down", retry_after_seconds=50.0)]), cancelled=cancelled, uniform=longest
    )
    threading.Timer(0.1, cancelled.set).start()
    begun = time.monotonic()

    with pytest.raises(LoadCancelledError):
        read(storage)

    assert time.monotonic() - begun < 20


def test_an_object_that_became_shorter_is_a_changed_source() -> None:
    """A stream without a byte where the object now ends earlier is not tried for ever."""
    storage = Scripted([0], size=50)
    storage.stat = lambda path: ObjectInfo(path, 50)  # type: ignore[method-assign]  # what stat says now

    with pytest.raises(SourceChangedError, match="50 bytes now"):
        read(retrying(storage), offset=60)


def test_an_empty_stream_of_a_whole_object_is_tried_again() -> None:
    """A connection that breaks before its first byte looks like an end, and is not one."""
    storage = Scripted([0, 0, 100])
    storage.stat = lambda path: ObjectInfo(path, len(CONTENT))  # type: ignore[method-assign]  # not scripted

    assert read(retrying(storage)) == CONTENT[:100]


@pytest.mark.parametrize("count", [-1, 101])
def test_a_plugin_that_counts_wrongly_is_stopped(count: int) -> None:
    """A count outside the buffer would make the rest of the read go to a wrong place."""
    storage = Scripted([count])
    storage.read_into = lambda *args, **kwargs: count  # type: ignore[method-assign]  # the wrong backend

    with pytest.raises(BackendError, match=f"returned {count}"):
        read(retrying(storage))


def test_a_listing_that_breaks_is_taken_up_without_doubles() -> None:
    """Each object is seen once, however often the listing was begun."""
    storage = Scripted([UnavailableError("reset"), UnavailableError("reset")])

    found = [info.path for info in retrying(storage).list("")]

    assert found == ["a", "b"]


def test_requests_that_repeat_one_are_counted() -> None:
    """Each is counted once, whether the first request was cut short or failed."""
    retries: list[None] = []
    storage = Scripted([30, UnavailableError("reset")])

    read(retrying(storage, on_retry=lambda: retries.append(None)))

    assert len(retries) == 2
