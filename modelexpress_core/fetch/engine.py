"""The engine: ranges in, bytes in place.

Threads do the reading, because the calls that matter (``preadv``, ``recv_into``, TLS reads, copies) release the GIL.
They take ranges from a queue; ranges that somebody waits for go first. The first error ends the load: what has not
begun is dropped, what has is cut short by closing the storage, and nobody touches the destination any more when the
error reaches the caller.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from modelexpress_core.errors import BackendError, ThrottledError
from modelexpress_core.fetch.concurrency import ConcurrencyLimit, concurrency_for
from modelexpress_core.fetch.ledger import Ledger
from modelexpress_core.fetch.request import Range, Ticket
from modelexpress_core.fetch.retry import RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.fetch.staging import StagingPool
from modelexpress_core.providers import StorageCapabilities
from modelexpress_core.settings import LoadSettings
from modelexpress_core.storage import Storage

__all__ = ["FetchEngine"]

_log = logging.getLogger(__name__)
_thread_numbers = itertools.count(1)

#: Reads are cut short when a load fails; one that still runs after this is reported.
_ABORT_SECONDS = 60.0


class FetchEngine:
    """Fetches ranges of one storage.

    Args:
        storage: Where from.
        settings: Chunk size, staging budget, retries.
        capabilities: What the storage declares.
        on_arrival: Called from the fetching threads after each range that arrived.
        budget: Waiting time shared with whatever else the load does.
        limit: How many reads may be under way; by default what ``settings`` and ``capabilities`` say.
    """

    def __init__(
        self,
        storage: Storage,
        settings: LoadSettings,
        capabilities: StorageCapabilities,
        *,
        on_arrival: Callable[[], None] = lambda: None,
        budget: RetryBudget | None = None,
        limit: ConcurrencyLimit | None = None,
    ) -> None:
        self.ledger = Ledger()
        self.capabilities = capabilities
        self.staging = StagingPool(settings.staging_bytes, settings.chunk_bytes)
        #: Largest range that is read at once.
        self.chunk_bytes = self.staging.buffer_bytes
        self._raw_storage = storage
        self._cancelled = threading.Event()
        self._storage = RetryingStorage(
            storage,
            RetryPolicy.from_settings(settings),
            budget or RetryBudget(settings.retry_budget_seconds),
            cancelled=self._cancelled,
            on_request=lambda again: self.ledger.request(again=again),
            on_failure=self._failed_once,
        )
        self._on_arrival = on_arrival
        self._limit = limit or concurrency_for(capabilities, settings)
        self._lock = threading.Lock()
        self._work_ready = threading.Condition(self._lock)
        self._progress = threading.Condition(self._lock)
        self._urgent: deque[Sequence[Range]] = deque()
        self._queue: deque[Sequence[Range]] = deque()
        self._threads: list[threading.Thread] = []
        self._busy = 0
        self._pending_segments = 0
        self._stopping = False
        self._error: BaseException | None = None

    # -- for whoever loads --------------------------------------------------------------------------------------------

    def submit(self, batches: Sequence[Sequence[Range]], *, urgent: bool = False) -> None:
        """Fetch the ranges of each batch one after another, and the batches at once; ``urgent`` ones before others.

        All segments of a ticket are submitted in one call.

        Raises:
            BaseException: The error that already ended this load.
        """
        self.ledger.plan(sum(range_.length for batch in batches for range_ in batch))
        with self._lock:
            self._raise_error()
            for batch in batches:
                for range_ in batch:
                    self._pending_segments += len(range_.segments)
                    for segment in range_.segments:
                        segment.ticket.remaining += 1
            (self._urgent if urgent else self._queue).extend(batches)
            self._set_to_work(len(batches))

    def wait(self, tickets: Iterable[Ticket]) -> None:
        """Return when everything that ``tickets`` stand for is in place.

        Raises:
            BaseException: The error that ended the load.
        """
        with self._lock:
            for ticket in tickets:
                while not ticket.done:
                    self._raise_error()
                    self._progress.wait()

    def finish(self) -> None:
        """Wait for everything that was submitted, check the account, stop.

        Raises:
            BaseException: The error that ended the load.
            IncompleteLoadError: Bytes are missing although nothing failed.
        """
        with self._lock:
            while self._pending_segments or self._busy:
                self._raise_error()
                self._progress.wait()
            self._raise_error()
        self._stop()
        self.ledger.check()

    def abort(self, reason: BaseException) -> bool:
        """End the load: drop what has not begun, cut short what has, wait until no thread touches a destination.

        Returns:
            False where a read could not be stopped, so that destinations must not be used.
        """
        self._fail(reason)
        deadline = time.monotonic() + _ABORT_SECONDS
        with self._lock:
            while self._busy:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._progress.wait(left)
            still_busy = self._busy
        self._stop()
        if still_busy:
            _log.error("%d reads did not stop within %.0f s of the end of the load", still_busy, _ABORT_SECONDS)
        return not still_busy

    # -- threads ------------------------------------------------------------------------------------------------------

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _failed_once(self, error: BackendError) -> None:
        if isinstance(error, ThrottledError):
            self._limit.throttled()

    def _set_to_work(self, batches: int) -> None:
        """Have as many threads as the limit allows and the queue needs, and wake them."""
        wanted = min(self._limit.reads, self._busy + len(self._urgent) + len(self._queue))
        while len(self._threads) < wanted:
            self._start_thread()
        self._work_ready.notify(batches)

    def _start_thread(self) -> None:
        name = f"mx-fetch-{next(_thread_numbers)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._stopping and not (self._busy < self._limit.reads and (self._urgent or self._queue)):
                    self._work_ready.wait()
                if self._stopping:
                    return
                batch = (self._urgent or self._queue).popleft()
                self._busy += 1
            try:
                self._fetch(batch)
            except BaseException as exc:  # noqa: BLE001 - it reaches the caller through the load
                self._fail(exc)
            finally:
                with self._lock:
                    self._busy -= 1
                    self._progress.notify_all()
                    if not self._stopping and (self._queue or self._urgent):
                        self._set_to_work(1 + self._limit.reads - self._busy)
                del batch

    def _fetch(self, batch: Sequence[Range]) -> None:
        """Fetch one batch. Accounts are kept by batch, because a range may be a few hundred bytes."""
        self.ledger.begin()
        arrived = 0
        try:
            for range_ in batch:
                self._fetch_range(range_)
            arrived = sum(range_.length for range_ in batch)
        finally:
            self.ledger.end(arrived)
        with self._lock:
            for range_ in batch:
                self._pending_segments -= len(range_.segments)
                for segment in range_.segments:
                    ticket = segment.ticket
                    ticket.remaining -= 1
                    if not ticket.remaining:
                        ticket.done = True
            self._progress.notify_all()
        self._limit.arrived(arrived)
        self._on_arrival()

    def _fetch_range(self, range_: Range) -> None:
        memory = range_.direct
        if memory is not None:
            self._read(range_, memory)
            return
        with self.staging.borrow(range_.length) as buffer:
            self._read(range_, buffer)
            for segment in range_.segments:
                start = segment.offset - range_.offset
                part = buffer[start : start + segment.length]
                if segment.deliver is not None:
                    segment.deliver(part)
                elif segment.memory is not None:
                    segment.memory[:] = part

    def _read(self, range_: Range, memory: memoryview) -> None:
        file, runs = range_.file, range_.segments[0].runs
        if runs is None:
            self._storage.read_into(file.path, range_.offset, memory, version=file.version)
        else:
            self._storage.read_runs(file.path, range_.offset, *runs, memory, version=file.version)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            first = self._error is None
            if first:
                self._error = error
            self._queue.clear()
            self._urgent.clear()
            self._cancelled.set()
            self._progress.notify_all()
        if first:
            self._raw_storage.close()

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True
            self._work_ready.notify_all()
            threads = list(self._threads)
            idle = not self._busy
        if idle:
            for thread in threads:
                thread.join()
