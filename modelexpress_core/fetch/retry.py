"""Retries: the only module that decides to retry, and the only one that waits.

A read resumes at the first missing byte. The time between attempts is drawn at random between zero and a bound that
doubles (full jitter: https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/), added to the
time that the other side asked for, if any. All reads of a load share one budget of waiting time, so that a dead storage
fails a load once, not once per read.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TypeVar, cast

from attrs import frozen

from modelexpress_core.contracts.storage import (
    BatchStorage,
    Completion,
    ObjectInfo,
    ReadRequest,
    RestrictedStorage,
    RunStorage,
    Storage,
)
from modelexpress_core.errors import (
    BackendError,
    ModelExpressError,
    SourceChangedError,
    StillArrivingError,
    ThrottledError,
    UnavailableError,
)
from modelexpress_core.messages import byte_range
from modelexpress_core.settings import LoadSettings

__all__ = ["LoadCancelledError", "RetryBudget", "RetryPolicy", "RetryingStorage"]

_R = TypeVar("_R")

#: Bounds of one listing, which is kept in memory: a model has a few thousand objects at most, with names of a hundred
#: bytes. The largest repositories of data have 100,000.
_MAX_LISTED_OBJECTS = 200_000
_MAX_LISTED_NAME_BYTES = 64 << 20

#: Objects that one listing may repeat. No storage repeats any, but one that changes meanwhile might.
_MAX_LISTED_AGAIN = 1000


#: How long a reader waits for bytes that are still arriving at their server, while no more of them arrive: this many
#: times MX_STALL_SECONDS.
_ARRIVAL_STALL_FACTOR = 10

#: Time between two requests for bytes that are still arriving, unless the server asks for another.
_ARRIVAL_POLL_SECONDS = 1.0

_log = logging.getLogger(__name__)


class LoadCancelledError(ModelExpressError):
    """The load ended while this read waited; the load's own error says why."""


@frozen
class RetryPolicy:
    """When to retry.

    Attributes:
        attempts: Attempts of one read without a byte of progress.
        base_seconds: Bound of the first wait.
        cap_seconds: Upper bound of each wait, unless the other side asks for more.
        arrival_seconds: How long to wait for bytes that are still arriving at their server, while no more of them do.
    """

    attempts: int = 8
    base_seconds: float = 0.1
    cap_seconds: float = 10.0
    arrival_seconds: float = 300.0

    @classmethod
    def from_settings(cls, settings: LoadSettings) -> RetryPolicy:
        """The policy that the user set."""
        return cls(attempts=settings.retry_attempts, arrival_seconds=_ARRIVAL_STALL_FACTOR * settings.stall_seconds)

    def delay(self, failures: int, asked: float | None, uniform: Callable[[float, float], float]) -> float:
        """Seconds to wait after ``failures`` failures in a row; ``asked``: seconds that the other side asked for."""
        bound = min(self.cap_seconds, self.base_seconds * 2 ** min(failures - 1, 30))
        drawn = uniform(0.0, bound)
        return drawn if asked is None else asked + drawn


class RetryBudget:
    """Waiting time that the reads of one load share."""

    def __init__(self, seconds: float) -> None:
        self._lock = threading.Lock()
        self._left = seconds

    def spend(self, seconds: float) -> bool:
        """Take ``seconds`` from the budget; False, taking nothing, if less is left."""
        with self._lock:
            if seconds > self._left:
                return False
            self._left -= seconds
            return True


class _Arrival:
    """Whether bytes of a model still arrive at their server. Thread-safe.

    Args:
        seconds: How long none may arrive.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._present_bytes = -1
        self._since = 0.0  # when this number was first seen, by the monotonic clock

    def goes_on(self, present_bytes: int) -> bool:
        """Note how many have arrived; False if it has been this number for too long."""
        now = time.monotonic()
        with self._lock:
            if present_bytes != self._present_bytes:
                self._present_bytes, self._since = present_bytes, now
            return now - self._since < self._seconds


def _untranslated(exc: Exception, path: str) -> BackendError:
    """An exception that a storage plugin did not translate, as an error that names the object and the culprit."""
    reason = f"the storage plugin did not translate {type(exc).__name__} at {path!r}: {exc}"
    return BackendError(reason, hint="report it to the plugin's authors")


@contextmanager
def _translated_errors(path: str) -> Iterator[None]:
    """Turn exceptions that the storage plugin did not translate into our own errors."""
    try:
        yield
    except (ModelExpressError, MemoryError):  # the latter is no fault of the plugin
        raise
    except Exception as exc:
        raise _untranslated(exc, path) from exc


class RetryingStorage:
    """A storage that retries if its errors say that this can help. ``read_into`` fills the whole buffer.

    Args:
        storage: The storage to ask.
        policy: When to retry.
        budget: Waiting time, shared by all users of the budget.
        cancelled: Set when the load ends: waiting stops at once.
        on_retry: Called for each request that is sent again.
        on_failure: Called with each error, whether it is retried or not.
        on_read: Called after each successful read, with its seconds and whether it returned all its bytes; None to
            measure nothing.
        uri_of: The redacted URI of an object, from its path.
        uniform: Draws a number between two others.
    """

    def __init__(
        self,
        storage: Storage,
        policy: RetryPolicy,
        budget: RetryBudget,
        *,
        cancelled: threading.Event | None = None,
        on_retry: Callable[[], None] = lambda: None,
        on_failure: Callable[[BackendError], None] = lambda error: None,  # noqa: ARG005 - does nothing
        on_read: Callable[[float, bool], None] | None = None,
        uri_of: Callable[[str], str] = str,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._on_failure = on_failure
        self._on_read = on_read
        self._uri_of = uri_of
        self._storage = storage
        self._policy = policy
        self._arrival = _Arrival(policy.arrival_seconds)
        self._budget = budget
        self._cancelled = cancelled or threading.Event()
        self._on_retry = on_retry
        self._uniform = uniform

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the storage's; a listing that fails starts again and continues after the objects already seen.

        Raises:
            BackendError: The storage failed, or the listing has no end.
        """
        seen: set[str] = set()
        name_bytes = failures = 0
        while True:
            if failures:
                self._on_retry()
            may_repeat = len(seen) + _MAX_LISTED_AGAIN
            try:
                with _translated_errors(prefix):
                    listing = iter(self._storage.list(prefix))
                while True:
                    with _translated_errors(prefix):
                        info = next(listing, None)
                    if info is None:
                        break
                    if info.path in seen:
                        may_repeat -= 1
                        if may_repeat < 0:
                            raise self._endless(prefix, "the storage lists the same objects again and again")
                        continue
                    name_bytes += len(info.path) + len(info.version or "")
                    if len(seen) >= _MAX_LISTED_OBJECTS or name_bytes > _MAX_LISTED_NAME_BYTES:
                        raise self._endless(
                            prefix,
                            f"more than {_MAX_LISTED_OBJECTS} objects, or names of more than {_MAX_LISTED_NAME_BYTES} "
                            "bytes, are below it",
                        )
                    failures = 0
                    seen.add(info.path)
                    yield info
            except BackendError as exc:
                failures += 1
                self._wait(exc, failures)
            else:
                return

    def _endless(self, prefix: str, reason: str) -> BackendError:
        return BackendError(
            reason,
            uri=self._uri_of(prefix),
            operation="list the objects",
            cause="the URI is that of many models, or the server's listing has no end",
            hint="give the URI of the directory of one model, and check the server",
        )

    def stat(self, path: str) -> ObjectInfo:
        """As the storage's."""
        return self._asked(path, lambda: self._storage.stat(path))

    def is_restricted(self, path: str) -> bool:
        """As the storage's; for storages that have it."""
        storage = cast("RestrictedStorage", self._storage)
        return self._asked(path, lambda: storage.is_restricted(path))

    def _asked(self, path: str, ask: Callable[[], _R]) -> _R:
        failures = 0
        while True:
            if failures:
                self._on_retry()
            try:
                with _translated_errors(path):
                    return ask()
            except BackendError as exc:
                failures += 1
                self._wait(exc, failures)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Fill ``buffer``, with as many requests as that takes.

        Returns:
            The length of ``buffer``.
        """
        storage = self._storage

        def read(done: int) -> int:
            count = storage.read_into(path, offset + done, buffer[done:] if done else buffer, version=version)
            left = len(buffer) - done
            return count if 0 < count <= left else self._checked(count, path, offset + done, left)

        return self._fill(path, len(buffer), read)

    def read_runs(
        self, path: str, offset: int, run_bytes: int, stride_bytes: int, buffer: memoryview, *, version: str | None
    ) -> int:
        """Fill ``buffer`` with runs, as the storage's method does, with as many calls as that takes.

        Returns:
            The length of ``buffer``.
        """
        storage = cast("RunStorage", self._storage)

        def read(done: int) -> int:
            first = offset + done // run_bytes * stride_bytes
            count = storage.read_runs(path, first, run_bytes, stride_bytes, buffer[done:], version=version)
            return self._checked(count, path, first, len(buffer) - done, run_bytes)

        return self._fill(path, len(buffer), read)

    def read_batch(self, requests: Sequence[ReadRequest], arrived: Callable[[int], None]) -> None:
        """Read all ``requests`` with the storage's own engine, with as many batches as that takes.

        Args:
            requests: As in ``BatchStorage.read_batch``.
            arrived: Called once for each request, with its position, when its bytes are in place.
        """
        left = dict(enumerate(requests))
        failures = 0
        while left:
            if self._cancelled.is_set():
                raise LoadCancelledError("the load was cancelled")
            if failures:
                for _ in left:
                    self._on_retry()
            before = len(left)
            error = self._read_batch_once(left, arrived)
            if error is not None:
                failures = failures + 1 if len(left) == before else 1
                self._wait(error, failures)

    def _read_batch_once(self, left: dict[int, ReadRequest], arrived: Callable[[int], None]) -> BackendError | None:
        """Read ``left``, and remove what arrived from it. Returns the error of what did not arrive."""
        positions = list(left)
        first = left[positions[0]].path
        open_positions = set(range(len(positions)))
        errors: list[BackendError] = []
        try:
            with _translated_errors(first):
                batch = cast("BatchStorage", self._storage).read_batch(list(left.values()))
            with closing(batch):
                while True:
                    with _translated_errors(first):
                        completion: Completion | None = next(batch, None)
                    if completion is None:
                        break
                    if completion.index not in open_positions:
                        raise self._broken_batch(
                            first, f"a completion of request {completion.index!r}, which is not open"
                        )
                    open_positions.remove(completion.index)
                    if completion.error is None:
                        position = positions[completion.index]
                        arrived(position)
                        del left[position]
                    else:
                        errors.append(completion.error)
                        if not completion.error.retryable:
                            return completion.error
                    if self._cancelled.is_set():
                        raise LoadCancelledError("the load was cancelled")
        except BackendError as exc:
            return exc
        if open_positions:
            return self._broken_batch(first, f"no completion of {len(open_positions)} of {len(positions)} requests")
        errors.sort(key=lambda error: not isinstance(error, ThrottledError))  # it lowers the number of reads
        return errors[0] if errors else None

    def _broken_batch(self, path: str, found: str) -> BackendError:
        return BackendError(
            f"read_batch yielded {found}",
            uri=self._uri_of(path),
            operation="read",
            hint="report it to the plugin's authors",
        )

    def _fill(self, path: str, total: int, read: Callable[[int], int]) -> int:
        """Call ``read`` with the number of bytes read so far, until ``total`` are read."""
        done, failures = 0, 0
        on_read = self._on_read
        while done < total:
            if self._cancelled.is_set():
                raise LoadCancelledError("the load was cancelled")
            if failures or done:
                self._on_retry()
            begun = time.monotonic() if on_read is not None else 0.0
            try:
                done += read(done)
            except BackendError as exc:
                failures = self._wait(exc, failures + 1)
            except (ModelExpressError, MemoryError):
                raise
            except Exception as exc:  # noqa: BLE001 - becomes our own error
                failure = _untranslated(exc, path)
                failure.__cause__ = exc
                self._wait(failure, failures + 1)
            else:
                failures = 0
                if on_read is not None:
                    on_read(time.monotonic() - begun, done == total)
        return total

    def _checked(self, count: int, path: str, offset: int, length: int, unit: int = 1) -> int:
        """The number of bytes that a storage says it has read, if that is possible."""
        if count % unit or not 0 <= count <= length:
            message = f"a read returned {count} for a buffer of {length} bytes"
            raise BackendError(
                message, uri=self._uri_of(path), operation="read", hint="report it to the plugin's authors"
            )
        if count == 0:
            raise self._ended_early(path, offset, unit if unit > 1 else length)
        return count

    def close(self) -> None:
        """Close the storage."""
        self._storage.close()

    def _ended_early(self, path: str, offset: int, length: int) -> BackendError:
        """The error for a stream without a byte: the object was cut short, or the connection was."""
        size = self._storage.stat(path).size
        operation = f"read {byte_range(offset, length)}"
        if size < offset + length:
            return SourceChangedError(
                f"it has {size} bytes now, fewer than when the load began",
                uri=self._uri_of(path),
                operation=operation,
                cause="the file is being written, or was cut short",
                hint="start the load again when it is complete",
            )
        return UnavailableError("the stream ended before its first byte", uri=self._uri_of(path), operation=operation)

    def _wait(self, exc: BackendError, failures: int) -> int:
        """Wait before the next attempt, or raise ``exc`` if there is none; returns the failures so far."""
        exc.attempts = failures
        self._on_failure(exc)
        if isinstance(exc, StillArrivingError) and self._arrival.goes_on(exc.present_bytes):
            _log.debug("waiting for bytes that are still arriving: %s", exc.headline)
            if self._cancelled.wait(exc.retry_after_seconds or _ARRIVAL_POLL_SECONDS):
                raise LoadCancelledError("the load was cancelled") from exc
            return failures - 1  # it is no failure
        if not exc.retryable or failures >= self._policy.attempts:
            raise exc
        delay = self._policy.delay(failures, exc.retry_after_seconds, self._uniform)
        if not self._budget.spend(delay):
            _log.debug("not retrying, because the waiting time of this load is used up: %s", exc.headline)
            raise exc
        _log.debug("retrying in %.2f s: %s", delay, exc.headline)
        if self._cancelled.wait(delay):
            raise LoadCancelledError("the load was cancelled") from exc
        return failures
