"""The engine: ranges in, bytes in place.

Threads read, because the calls that matter (``preadv``, ``recv_into``, TLS reads, copies) release the GIL. They take
ranges from a queue; urgent ranges, for which code waits, go first. A storage with its own engine gets many ranges at a
time from each thread. The first error ends the load: reads that have not begun are dropped, reads under way are cut
short by closing the storage, and no thread touches the destination when the error reaches the caller. At the end the
digests of whole files are compared, the versions of all files once more (if the storage can do that), and planned bytes
with those that arrived.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

from modelexpress_core.contracts.storage import PatientStorage, ReadRequest, RecheckingStorage, Storage
from modelexpress_core.errors import BackendError, DeadlineError, ResourceError, StillArrivingError, ThrottledError
from modelexpress_core.fetch.concurrency import ConcurrencyLimit, concurrency_for
from modelexpress_core.fetch.integrity import Integrity
from modelexpress_core.fetch.ledger import Ledger
from modelexpress_core.fetch.limiter import UsageMeter
from modelexpress_core.fetch.pages import make_pages
from modelexpress_core.fetch.request import Range, Ticket
from modelexpress_core.fetch.retry import RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.fetch.staging import StagingPool
from modelexpress_core.fetch.stalls import Patience
from modelexpress_core.messages import byte_range
from modelexpress_core.providers import StorageCapabilities
from modelexpress_core.resources import out_of_memory, start_thread
from modelexpress_core.settings import LoadSettings

if TYPE_CHECKING:
    from modelexpress_core.checkpoint import CheckpointFile

__all__ = ["FetchEngine"]

_log = logging.getLogger(__name__)
_thread_numbers = itertools.count(1)

#: Reads are cut short when a load fails; those that still run after this are reported.
_ABORT_SECONDS = 60.0

#: A read is hung if it takes longer than this many times MX_STALL_SECONDS, plus the time of its bytes at this rate: its
#: storage does not notice that no answer comes (a network file system without its server, for example).
_HUNG_STALL_FACTOR = 10
_HUNG_BYTES_PER_SECOND = 100_000
_HUNG_CHECK_SECONDS = 1.0

#: A storage with its own engine gets this much at a time. Urgent ranges wait for what it has.
_READ_BATCH_BYTES = 128 << 20


class FetchEngine:
    """Fetches ranges of one storage.

    Args:
        storage: The storage to read from.
        settings: Chunk size, staging budget, retries.
        capabilities: What the storage declares.
        on_arrival: Called by the fetching threads after each batch that arrived.
        budget: Waiting time, shared with the other requests of the load.
        limit: How many reads may be under way; by default from ``settings`` and ``capabilities``.
        uri_of: The redacted URI of a file, from its path.

    Attributes:
        ledger: What was planned and what arrived.
        usage: Where time is spent.
        staging: Buffers for bytes that cannot be read directly into place.
        capabilities: What the storage declares.
        force_staging: Whether everything is read through staging buffers.
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
            on_read=self._read_once if capabilities.patience else None,  # otherwise nothing uses it
            uri_of=uri_of,
        )
        self._uri_of = uri_of
        # A storage that compares chunks needs no digests of whole files besides.
        compare_files = settings.verify_digests and not capabilities.compares
        self._integrity = Integrity(enabled=compare_files, uri_of=uri_of)
        self._stall_seconds = settings.stall_seconds
        self._patience = Patience(settings.stall_seconds)
        if capabilities.patience:
            self._set_patience(self._patience.seconds)
        self._on_arrival = on_arrival
        self._limit = limit or concurrency_for(capabilities, settings)
        self._lock = threading.Lock()
        self._work_ready = threading.Condition(self._lock)
        self._progress = threading.Condition(self._lock)  # a ticket may be done
        self._idle = threading.Condition(self._lock)  # no read is under way
        self._urgent: deque[Sequence[Range]] = deque()
        self._queue: deque[Sequence[Range]] = deque()
        self._threads: list[threading.Thread] = []
        self._may_start_threads = True
        self._busy = 0
        self._running: dict[int, tuple[float, Range, int]] = {}  # since when, the first range, the bytes
        self._pending_segments = 0
        self._files: dict[str, CheckpointFile] = {}
        self._stopping = False
        self._error: BaseException | None = None

    # -- for the loader -----------------------------------------------------------------------------------------------

    def submit(self, batches: Sequence[Sequence[Range]], *, urgent: bool = False) -> None:
        """Fetch batches concurrently, the ranges of a batch one after another; ``urgent`` batches go first.

        All segments of a ticket are submitted in one call.

        Raises:
            BaseException: The error that already ended this load.
        """
        self.ledger.plan(sum(range_.length for batch in batches for range_ in batch))
        with self._lock:
            self._raise_error()
            for batch in batches:
                for range_ in batch:
                    self._files[range_.file.path] = range_.file
                    self._pending_segments += len(range_.segments)
                    for segment in range_.segments:
                        segment.ticket.remaining += 1
            (self._urgent if urgent else self._queue).extend(batches)
            self._wake_threads(len(batches))

    def wait(self, tickets: Iterable[Ticket]) -> None:
        """Return when every byte of ``tickets`` is in place.

        Raises:
            BaseException: The error that ended the load.
        """
        with self._lock:
            for ticket in tickets:
                while not ticket.done:
                    self._await(self._progress)

    def finish(self) -> None:
        """Wait for everything that was submitted, compare digests and versions, check that all bytes arrived, stop.

        Raises:
            BaseException: The error that ended the load.
            SourceChangedError: A file changed after its last read.
            IntegrityError: A file that was read as a whole differs from the stored one.
            IncompleteLoadError: Bytes are missing although nothing failed.
        """
        with self._lock:
            while self._pending_segments or self._busy:
                self._await(self._idle)
            self._raise_error()
        self.ledger.verified(self._integrity.check(self._reread))
        if self.capabilities.recheck:
            self._check_unchanged()
        self._stop()
        self.ledger.check()

    def abort(self, reason: BaseException) -> bool:
        """End the load: drop queued reads, cut short those under way, wait until no thread touches a destination.

        Returns:
            False if a read could not be stopped: destinations must not be used then.
        """
        self._fail(reason)
        deadline = time.monotonic() + _ABORT_SECONDS
        with self._lock:
            while self._busy:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._idle.wait(left)
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
        """Wait, with the lock held, for ``condition``; raise if a read is hung."""
        self._raise_error()
        if condition.wait(_HUNG_CHECK_SECONDS):
            return
        now = time.monotonic()
        for begun, range_, length in list(self._running.values()):  # other threads change it
            allowed = _HUNG_STALL_FACTOR * self._stall_seconds + length / _HUNG_BYTES_PER_SECOND
            if now - begun > allowed:
                raise DeadlineError(
                    f"no answer for {now - begun:.0f} s",
                    uri=self._uri_of(range_.file.path),
                    operation=f"read {byte_range(range_.offset, range_.length)}",
                    cause="the storage or the network to it is gone, and its client does not notice",
                    hint="check the storage or the mount; MX_STALL_SECONDS sets how long to wait",
                )

    def _failed_once(self, error: BackendError) -> None:
        if isinstance(error, StillArrivingError):
            thread = threading.get_ident()
            if thread in self._running:  # it is not hung: its bytes are on their way to the server
                self._running[thread] = (time.monotonic(), *self._running[thread][1:])
            return
        throttled = isinstance(error, ThrottledError)
        self.usage.add(failures=1, throttled=throttled)
        if throttled:
            self._limit.throttled()
        if isinstance(error, DeadlineError) and self.capabilities.patience:
            self._set_patience(self._patience.stalled())

    def _read_once(self, seconds: float, whole: bool) -> None:
        if whole:
            self._set_patience(self._patience.completed(seconds))
        elif seconds >= self._patience.seconds:
            self._set_patience(self._patience.stalled())

    def _set_patience(self, seconds: float) -> None:
        cast("PatientStorage", self._raw_storage).patience_seconds = seconds

    def _wake_threads(self, batches: int) -> None:
        """Start as many threads as the limit allows and the queue needs, and wake them."""
        wanted = min(self._limit.reads, self._busy + len(self._urgent) + len(self._queue))
        while len(self._threads) < wanted and self._may_start_threads:
            self._start_thread()
        self._work_ready.notify(batches)

    def _start_thread(self) -> None:
        name = f"mx-fetch-{next(_thread_numbers)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            start_thread(thread, "read the files of the model")
        except ResourceError as exc:
            if not self._threads:
                raise
            self._may_start_threads = False
            _log.warning("the load goes on without more threads than %d: %s", len(self._threads), exc.headline)
        else:
            self._threads.append(thread)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._stopping and not (self._busy < self._limit.reads and (self._urgent or self._queue)):
                    self._work_ready.wait()
                if self._stopping:
                    return
                batch = self._take()
                self._busy += 1
            try:
                self._fetch(batch)
            except MemoryError as exc:
                error = out_of_memory(f"a part of {self._uri_of(batch[0].file.path)}", exc)
                error.__cause__ = exc
                self._fail(error)
            except BaseException as exc:  # noqa: BLE001 - the caller gets it from the load
                self._fail(exc)
            finally:
                with self._lock:
                    self._busy -= 1
                    if not self._busy:
                        self._idle.notify_all()
                    # This thread takes the next batch; if the limit was raised, others can take more.
                    others = min(self._limit.reads - self._busy, len(self._urgent) + len(self._queue)) - 1
                    if others > 0 and not self._stopping:
                        self._wake_threads(others)
                del batch

    def _take(self) -> Sequence[Range]:
        """The next batch of the queue, with the lock held; several together for a storage with its own engine."""
        queue = self._urgent or self._queue
        batch = queue.popleft()
        if not self.capabilities.read_batch:
            return batch
        together = list(batch)
        length = sum(range_.length for range_ in together)
        while queue and length < _READ_BATCH_BYTES:
            together += queue[0]
            length += sum(range_.length for range_ in queue.popleft())
        return together

    def _fetch(self, batch: Sequence[Range]) -> None:
        """Fetch one batch. Figures are counted by batch, because a range may have a few hundred bytes."""
        self.ledger.begin(len(batch))
        arrived = 0
        begun = time.monotonic()
        delivering_seconds = 0.0
        try:
            if self.capabilities.read_batch:
                delivering_seconds = self._fetch_together(batch)
            else:
                for range_ in batch:
                    delivering_seconds += self._fetch_range(range_)
            arrived = sum(range_.length for range_ in batch)
        finally:
            self.ledger.end(arrived)
            self._running.pop(threading.get_ident(), None)
            reading_seconds = time.monotonic() - begun - delivering_seconds
            self.usage.add(reading_seconds=reading_seconds, delivering_seconds=delivering_seconds, requests=len(batch))
        with self._lock:
            for range_ in batch:
                self._pending_segments -= len(range_.segments)
                for segment in range_.segments:
                    ticket = segment.ticket
                    ticket.remaining -= 1
                    if not ticket.remaining:
                        ticket.done = True
            self._progress.notify_all()  # usually nothing waits
        self._limit.arrived(arrived)
        self._on_arrival()

    def _fetch_range(self, range_: Range) -> float:
        """Fetch one range; returns the seconds spent on waiting for a staging buffer and copying from it."""
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
            delivered = self._deliver(range_, buffer)
            self._integrity.arrived(range_, buffer)
        return waited + delivered

    def _fetch_together(self, batch: Sequence[Range]) -> float:
        """Fetch ``batch`` with the storage's own engine; returns the seconds as ``_fetch_range`` does.

        Ranges that go through staging buffers are read when there are buffers for them, some at a time.
        """
        seconds = 0.0
        placed = [(range_, range_.direct) for range_ in batch if range_.direct is not None]
        staged = deque(range_ for range_ in batch if range_.direct is None)
        for range_, memory in placed:
            if range_.segments[0].ticket.fresh:
                make_pages(memory)
        if placed:
            seconds += self._read_together(placed)
        while staged:
            asked = time.monotonic()
            with self.staging.borrow_several([range_.length for range_ in staged]) as buffers:
                seconds += time.monotonic() - asked
                seconds += self._read_together([(staged.popleft(), buffer) for buffer in buffers])
        return seconds

    def _read_together(self, places: Sequence[tuple[Range, memoryview]]) -> float:
        """Read ranges into their memory, in one batch; returns the seconds spent on copying from it."""
        delivering_seconds = 0.0

        def arrived(index: int) -> None:
            nonlocal delivering_seconds
            range_, memory = places[index]
            if memory is not range_.direct:
                delivering_seconds += self._deliver(range_, memory)
            self._integrity.arrived(range_, memory)
            self._running[threading.get_ident()] = (time.monotonic(), first, length)

        first, length = places[0][0], sum(range_.length for range_, _ in places)
        self._running[threading.get_ident()] = (time.monotonic(), first, length)
        self._storage.read_batch(
            [ReadRequest(range_.file.path, range_.offset, memory, range_.file.version) for range_, memory in places],
            arrived,
        )
        return delivering_seconds

    @staticmethod
    def _deliver(range_: Range, buffer: memoryview) -> float:
        """Copy the parts of ``range_`` from ``buffer`` to their destinations; returns the seconds."""
        begun = time.monotonic()
        for segment in range_.segments:
            start = segment.offset - range_.offset
            segment.deliver(buffer[start : start + segment.length])
        return time.monotonic() - begun

    def _read(self, range_: Range, memory: memoryview) -> None:
        file, runs = range_.file, range_.segments[0].runs
        self._running[threading.get_ident()] = (time.monotonic(), range_, range_.length)
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

    def _check_unchanged(self) -> None:
        storage = cast("RecheckingStorage", self._raw_storage)
        for file in self._files.values():
            if file.version is not None:
                storage.check_unchanged(file.path, version=file.version)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            first = self._error is None
            if first:
                self._error = error
            self._queue.clear()
            self._urgent.clear()
            self._cancelled.set()
            self._progress.notify_all()
            self._idle.notify_all()
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
