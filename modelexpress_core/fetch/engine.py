"""The engine: ranges in, bytes in place.

Threads do the reading, because the calls that matter (``preadv``, ``recv_into``, TLS reads, copies) release the GIL.
They take ranges from a queue; ranges that somebody waits for go first. The first error ends the load: what has not
begun is dropped, what has is cut short by closing the storage, and nobody touches the destination any more when the
error reaches the caller. At the end the digests of whole files are compared, and the account is.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

from modelexpress_core.contracts.storage import PatientStorage, Storage
from modelexpress_core.errors import BackendError, DeadlineError, ThrottledError
from modelexpress_core.fetch.concurrency import ConcurrencyLimit, concurrency_for
from modelexpress_core.fetch.integrity import Integrity
from modelexpress_core.fetch.ledger import Ledger
from modelexpress_core.fetch.limiter import UsageMeter
from modelexpress_core.fetch.pages import make_pages
from modelexpress_core.fetch.request import Range, Ticket
from modelexpress_core.fetch.retry import RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.fetch.staging import StagingPool
from modelexpress_core.fetch.stalls import Patience
from modelexpress_core.providers import StorageCapabilities
from modelexpress_core.settings import LoadSettings

if TYPE_CHECKING:
    from modelexpress_core.checkpoint import CheckpointFile

__all__ = ["FetchEngine"]

_log = logging.getLogger(__name__)
_thread_numbers = itertools.count(1)

#: Reads are cut short when a load fails; one that still runs after this is reported.
_ABORT_SECONDS = 60.0

#: A read that has not ended after so many times MX_STALL_SECONDS, and the time that its bytes take at this rate, never
#: will: its storage does not notice that nobody answers (a network file system whose server is gone, say).
_HUNG_TIMES = 10
_HUNG_BYTES_PER_SECOND = 100_000
_LOOK_SECONDS = 1.0


class FetchEngine:
    """Fetches ranges of one storage.

    Args:
        storage: Where from.
        settings: Chunk size, staging budget, retries.
        capabilities: What the storage declares.
        on_arrival: Called from the fetching threads after each range that arrived.
        budget: Waiting time shared with whatever else the load does.
        limit: How many reads may be under way; by default what ``settings`` and ``capabilities`` say.
        uri_of: The redacted URI of a file, of its path.

    Attributes:
        ledger: The account.
        usage: Where time is spent.
        staging: Buffers for what cannot be read straight into place.
        capabilities: What the storage declares.
        force_staging: Whether nothing is to be read straight into place.
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
        uri_of: Callable[[str], str] = str,
    ) -> None:
        self.ledger = Ledger()
        self.usage = UsageMeter()
        self.capabilities = capabilities
        self.force_staging = settings.force_staging
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
            on_retry=self.ledger.sent_again,
            on_failure=self._failed_once,
            on_read=self._read_once if capabilities.patience else None,  # otherwise there is nobody to tell
            uri_of=uri_of,
        )
        self._uri_of = uri_of
        self._integrity = Integrity(enabled=settings.verify_digests, uri_of=uri_of)
        self._stall_seconds = settings.stall_seconds
        self._patience = Patience(settings.stall_seconds)
        if capabilities.patience:
            self._be_patient(self._patience.seconds)
        self._on_arrival = on_arrival
        self._limit = limit or concurrency_for(capabilities, settings)
        self._lock = threading.Lock()
        self._work_ready = threading.Condition(self._lock)
        self._progress = threading.Condition(self._lock)  # something is in place that somebody may wait for
        self._rest = threading.Condition(self._lock)  # nothing is under way
        self._urgent: deque[Sequence[Range]] = deque()
        self._queue: deque[Sequence[Range]] = deque()
        self._threads: list[threading.Thread] = []
        self._busy = 0
        self._running: dict[int, tuple[float, Range]] = {}
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
                    self._await(self._progress)

    def finish(self) -> None:
        """Wait for everything that was submitted, compare digests, check the account, stop.

        Raises:
            BaseException: The error that ended the load.
            IntegrityError: A file that was read as a whole is not what was stored.
            IncompleteLoadError: Bytes are missing although nothing failed.
        """
        with self._lock:
            while self._pending_segments or self._busy:
                self._await(self._rest)
            self._raise_error()
        self.ledger.verified(self._integrity.check(self._reread))
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
                self._rest.wait(left)
            still_busy = self._busy
        self._stop()
        if still_busy:
            _log.error("%d reads did not stop within %.0f s of the end of the load", still_busy, _ABORT_SECONDS)
        return not still_busy

    # -- threads ------------------------------------------------------------------------------------------------------

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _await(self, condition: threading.Condition) -> None:
        """Wait, with the lock, for ``condition``, but not for ever on reads that never end."""
        self._raise_error()
        if condition.wait(_LOOK_SECONDS):
            return
        now = time.monotonic()
        for begun, range_ in list(self._running.values()):  # threads change it meanwhile
            allowed = _HUNG_TIMES * self._stall_seconds + range_.length / _HUNG_BYTES_PER_SECOND
            if now - begun > allowed:
                raise DeadlineError(
                    f"no answer for {now - begun:.0f} s",
                    uri=self._uri_of(range_.file.path),
                    operation=f"read bytes {range_.offset}-{range_.offset + range_.length - 1}",
                    cause="the storage, or the network to it, is gone and its client does not notice",
                    hint="check the storage or the mount; MX_STALL_SECONDS sets how long to wait",
                )

    def _failed_once(self, error: BackendError) -> None:
        throttled = isinstance(error, ThrottledError)
        self.usage.add(failures=1, complaints=throttled)
        if throttled:
            self._limit.throttled()
        if isinstance(error, DeadlineError) and self.capabilities.patience:
            self._be_patient(self._patience.stalled())

    def _read_once(self, seconds: float, whole: bool) -> None:
        if whole:
            self._be_patient(self._patience.completed(seconds))
        elif seconds >= self._patience.seconds:
            self._be_patient(self._patience.stalled())

    def _be_patient(self, seconds: float) -> None:
        cast("PatientStorage", self._raw_storage).patience_seconds = seconds

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
                    if not self._busy:
                        self._rest.notify_all()
                    # The next batch is for this thread; there is work for others where the limit was raised.
                    others = min(self._limit.reads - self._busy, len(self._urgent) + len(self._queue)) - 1
                    if others > 0 and not self._stopping:
                        self._set_to_work(others)
                del batch

    def _fetch(self, batch: Sequence[Range]) -> None:
        """Fetch one batch. Accounts are kept by batch, because a range may be a few hundred bytes."""
        self.ledger.begin(len(batch))
        arrived = 0
        begun = time.monotonic()
        placing_seconds = 0.0
        try:
            for range_ in batch:
                placing_seconds += self._fetch_range(range_)
            arrived = sum(range_.length for range_ in batch)
        finally:
            self.ledger.end(arrived)
            self._running.pop(threading.get_ident(), None)
            reading_seconds = time.monotonic() - begun - placing_seconds
            self.usage.add(reading_seconds=reading_seconds, placing_seconds=placing_seconds, requests=len(batch))
        with self._lock:
            for range_ in batch:
                self._pending_segments -= len(range_.segments)
                for segment in range_.segments:
                    ticket = segment.ticket
                    ticket.remaining -= 1
                    if not ticket.remaining:
                        ticket.done = True
            self._progress.notify_all()  # nobody, mostly
        self._limit.arrived(arrived)
        self._on_arrival()

    def _fetch_range(self, range_: Range) -> float:
        """Seconds that it took to bring the bytes from where they were read to where they belong."""
        memory = range_.direct
        if memory is not None:
            if range_.segments[0].ticket.fresh:
                make_pages(memory)
            self._read(range_, memory)
            self._integrity.arrived(range_, memory)
            return 0.0
        asked = time.monotonic()
        with self.staging.borrow(range_.length) as buffer:
            waited = time.monotonic() - asked
            self._read(range_, buffer)
            begun = time.monotonic()
            for segment in range_.segments:
                start = segment.offset - range_.offset
                segment.place(buffer[start : start + segment.length])
            placed = time.monotonic() - begun
            self._integrity.arrived(range_, buffer)
        return waited + placed

    def _read(self, range_: Range, memory: memoryview) -> None:
        file, runs = range_.file, range_.segments[0].runs
        self._running[threading.get_ident()] = (time.monotonic(), range_)
        if runs is None:
            self._storage.read_into(file.path, range_.offset, memory, version=file.version)
        else:
            self._storage.read_runs(file.path, range_.offset, *runs, memory, version=file.version)

    def _reread(self, file: CheckpointFile, offset: int, length: int, use: Callable[[memoryview], None]) -> None:
        """Read a part of a file again, through a staging buffer."""
        end = offset + length
        while offset < end:
            with self.staging.borrow(min(end - offset, self.chunk_bytes)) as buffer:
                self._storage.read_into(file.path, offset, buffer, version=file.version)
                use(buffer)
                self.ledger.read_again(len(buffer))
                offset += len(buffer)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            first = self._error is None
            if first:
                self._error = error
            self._queue.clear()
            self._urgent.clear()
            self._cancelled.set()
            self._progress.notify_all()
            self._rest.notify_all()
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
