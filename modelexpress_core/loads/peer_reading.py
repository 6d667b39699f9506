"""Reads of the tensors of several workers at once, chunk by chunk, each verified where it arrived.

All sources take chunks from one queue, as many as each delivers in a short time. A source that fails, or that is much
slower than the others at the end, is stopped: once nothing of it writes any more, the others read its chunks.

The digest of a chunk is the one that the worker took when it offered the tensor, and every byte is compared with it. So
a chunk with the right digest is kept even if its worker dies before it confirms the lease. A worker that answers, and
says that the lease ended, has withdrawn its offer: its chunks are read again. Where digests are not compared, only a
confirmed lease proves that the memory was unchanged, and nothing of a dead worker is kept.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from modelexpress_core.contracts.transport import TensorRead
from modelexpress_core.errors import BackendError, DeadlineError, IntegrityError, ModelExpressError, UnavailableError
from modelexpress_core.loads.pace import batch_bytes, is_too_slow
from modelexpress_core.loads.peer_chunks import ChunkRead
from modelexpress_core.loads.peer_source import LeaseEnd, PeerSource
from modelexpress_core.loads.source_reads import SourceReads
from modelexpress_core.messages import byte_range
from modelexpress_core.resources import start_thread

if TYPE_CHECKING:
    from modelexpress_core.transport.chunk_digests import RunningDigest

__all__ = ["PeerReader"]

_log = logging.getLogger(__name__)
_E = TypeVar("_E", bound=BackendError)

_thread_numbers = itertools.count(1)

#: Threads that read from each source, so that one asks for bytes while the other receives some.
_THREADS = 2

#: Ranges that a transport gets at a time, however small they are.
_MAX_BATCH_CHUNKS = 256

#: Chunks of up to 4 MiB that wait for their digests. Readers wait then: what arrived last is still in the CPU's cache.
_MAX_UNVERIFIED = 8

#: How often silent and slow sources are looked for; and once all chunks are taken.
_CHECK_SECONDS = 0.2
_LAST_CHECK_SECONDS = 0.02

#: A source from which nothing has arrived for so long is asked whether it lives, and how long it may take to answer. A
#: worker that is stopped does not; one behind a slow network does.
_QUIET_SECONDS = 2.0
_ANSWER_SECONDS = 2.0

#: Reads that still run this long after their session was closed are reported.
_STOP_SECONDS = 60.0

#: How long a load waits for what a worker that failed says about its lease; and for what any worker says at the end, if
#: digests prove the bytes.
_SETTLE_SECONDS = 1.0
_CONFIRM_SECONDS = 2.0


class PeerReader:
    """Reads chunks from all sources that are added. Closing it ends reads in other threads.

    Args:
        chunks: What to read.
        stall_seconds: A source is stopped if none of its chunks arrives for this long, also if it says that it lives.
        verify: Whether digests are compared.
        on_arrival: Called by a thread of the reader after each chunk.
        on_loss: Called by a thread of the reader when a source has failed, or is stopped because it is slow, before its
            chunks are read elsewhere. It may open another source with ``open_more``.
        clock: A monotonic clock, in seconds.

    Attributes:
        sources: All sources, in the order in which they were added.
        arrived_bytes: Bytes in place, with the right digests.
        read_again: Chunks that were read once more: wrong digests, failed or slow sources, leases that had ended.
        reread_bytes: Bytes of those that had arrived before.
        threads: How many threads read.
        read_seconds: How long reading took.
        verify_seconds: How long one thread took for digests meanwhile.
        release_seconds: How long the workers took to confirm their leases; 0 if they were not asked.
    """

    def __init__(
        self,
        chunks: Sequence[ChunkRead],
        *,
        stall_seconds: float,
        verify: bool,
        on_arrival: Callable[[], None],
        on_loss: Callable[[SourceReads], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sources: list[SourceReads] = []
        self.arrived_bytes = self.read_again = self.reread_bytes = self.threads = 0
        self.read_seconds = self.verify_seconds = self.release_seconds = 0.0
        self._stall_seconds = stall_seconds
        self._verify = verify
        self._on_arrival = on_arrival
        self._on_loss = on_loss
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # for the thread that waits for the end
        self._work = threading.Condition(self._lock)  # for threads that wait for chunks to read
        self._to_verify = threading.Condition(self._lock)
        self._room_to_verify = threading.Condition(self._lock)
        self._left = deque(chunks)
        self._left_bytes = sum(len(chunk.destination) for chunk in chunks)
        self._missing = len(chunks)
        self._unverified: deque[tuple[SourceReads, ChunkRead]] = deque()
        self._joining = 0
        self._verifies = False
        self._closed = False
        self._error: BaseException | None = None

    @property
    def _ends(self) -> bool:
        return self._closed or self._error is not None

    # -- sources ------------------------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """How many sources read, or are ready to."""
        return sum(not each.stopping for each in self.sources)

    @property
    def joining(self) -> int:
        """How many threads of ``open_more`` run."""
        return self._joining

    @property
    def closed(self) -> bool:
        """Whether no more sources are taken."""
        return self._closed

    def open_more(self, join: Callable[[], None]) -> None:
        """Call ``join``, which may add a source, in a thread of its own. ``read`` does not give up before its end.

        Raises:
            ResourceError: No thread can be started.
        """

        def run() -> None:
            try:
                join()
            except BaseException as exc:  # noqa: BLE001 - the load must not wait for a source that never comes
                self.fail(exc)
            finally:
                joined()

        def joined() -> None:
            with self._lock:
                self._joining -= 1
                self._changed.notify_all()

        with self._lock:
            self._joining += 1
        try:
            self._start(run, "read from another worker")
        except BaseException:
            joined()
            raise

    def add(self, source: PeerSource) -> bool:
        """Read from ``source`` too, and close it in the end; return False, and do neither, if the reader is closed.

        Raises:
            ResourceError: No thread can be started.
        """
        reads = SourceReads(source, self._clock())
        with self._lock:
            if self._closed:
                return False
            self.sources.append(reads)
        for _ in range(_THREADS):
            with self._lock:
                reads.threads += 1
                self.threads += 1
            try:
                self._start(lambda: self._run(reads), "read the tensors of another worker")
            except ModelExpressError:
                with self._lock:
                    reads.threads -= 1
                    self.threads -= 1
                    if reads.threads:
                        return True  # it is read by one thread
                    self.sources.remove(reads)
                raise
        return True

    # -- the thread that waits ----------------------------------------------------------------------------------------

    def read(self) -> None:
        """Return when every chunk is in place and has its digest, and each worker has confirmed its lease.

        Raises:
            BackendError: No source is left; this is the error of the last one.
        """
        if self._verify and not self._verifies:
            self._verifies = True
            self._start(self._verify_all, "verify digests")
        while True:
            begun = self._clock()
            try:
                self._read_missing()
            finally:
                arrived = self._clock()
                self.read_seconds += arrived - begun
            try:
                if self._confirm_leases():
                    return
            finally:
                self.release_seconds += self._clock() - arrived

    def _read_missing(self) -> None:
        while True:
            with self._lock:
                if self._error is not None:
                    raise self._error
                now = self._clock()
                self._settle_leases(now)
                if not self._missing and self._is_settled():
                    return
                if not self._missing or self._is_waiting_for_sources():
                    lost = []
                elif not self.active:
                    raise self._last_error()
                else:
                    lost = [*self._silent(now), *self._slow(now)]
                    for reads, error in lost:
                        self._mark(reads, error)
                    self._ask_quiet(now)
                if not lost:
                    self._changed.wait(_CHECK_SECONDS if self._left else _LAST_CHECK_SECONDS)
            for reads, _ in lost:
                self._stop(reads)

    def _is_waiting_for_sources(self) -> bool:
        return not self.active and (self._joining > 0 or any(not each.stopped for each in self.sources))

    def _last_error(self) -> BackendError:
        return [each.error for each in self.sources if each.error is not None][-1]

    def _silent(self, now: float) -> list[tuple[SourceReads, BackendError | None]]:
        """Sources that have delivered nothing for too long, with the lock held."""
        return [
            (
                reads,
                self._failure(
                    reads,
                    DeadlineError,
                    f"no chunk arrived for {now - reads.progressed:.0f} s",
                    cause="the worker hangs or is stopped, or the network to it is gone",
                    hint="check the worker; MX_STALL_SECONDS sets how long to wait",
                ),
            )
            for reads in self.sources
            if reads.held and not reads.stopping and now - reads.progressed > self._stall_seconds
        ]

    def _ask_quiet(self, now: float) -> None:
        """Ask sources from which nothing arrives whether they live, with the lock held."""
        for reads in self.sources:
            since = max(reads.progressed, reads.asked)
            if reads.held and not reads.stopping and now - since > _QUIET_SECONDS:
                reads.asked = now + _ANSWER_SECONDS  # not again before it has answered
                self._start(lambda reads=reads: self._ask(reads), "ask another worker whether it lives")  # type: ignore[misc]

    def _ask(self, reads: SourceReads) -> None:
        """Give up a source that does not answer, unless bytes arrive meanwhile; in a thread of its own."""
        progressed = reads.progressed
        end, error = reads.source.check_lease(_ANSWER_SECONDS)
        silent = self._clock() - progressed
        if (
            end is not LeaseEnd.UNKNOWN
            or not isinstance(error, (DeadlineError, UnavailableError))
            or progressed != reads.progressed
        ):
            return
        lost = self._failure(
            reads,
            DeadlineError,
            f"no chunk arrived for {silent:.0f} s, and the worker does not answer",
            cause="it hangs, was stopped or has died, or the network to it is gone",
            hint="check the worker",
        )
        lost.__cause__ = error
        self._lose(reads, lost)

    def _slow(self, now: float) -> list[tuple[SourceReads, BackendError | None]]:
        """Sources whose chunks others would have much sooner, with the lock held: none while chunks are left."""
        if self._left:
            return []
        ready = [each for each in self.sources if not (each.stopping or each.held or each.again)]
        rates = [rate for each in ready if (rate := each.pace.rate(each.progressed))]
        if not rates:
            return []
        slow: list[tuple[SourceReads, BackendError | None]] = []
        for reads in self.sources:
            if reads.stopping or not reads.held:
                continue
            held = reads.held_bytes
            largest = max(len(chunk.destination) for chunk in reads.held)
            elsewhere = max(held / sum(rates), largest / max(rates))
            silent = now - reads.progressed  # for how long: it is expected to last as long again
            if is_too_slow(max(silent, reads.pace.seconds_for(held, now)), elsewhere_seconds=elsewhere):
                slow.append((reads, None))
        return slow

    # -- the end of a source ------------------------------------------------------------------------------------------

    def _mark(self, reads: SourceReads, error: BackendError | None) -> bool:
        """Give a source no more work, with the lock held; return False if that was done before."""
        if reads.stopping:
            return False
        reads.stopping = True
        reads.error = error
        self._work.notify_all()
        self._room_to_verify.notify_all()
        return True

    def _stop(self, reads: SourceReads) -> None:
        """Begin to stop a source that was marked."""
        try:
            self._start(lambda: self._end(reads), "close the connection to another worker")
        except ModelExpressError as exc:
            self.fail(exc)

    def _lose(self, reads: SourceReads, error: BackendError) -> None:
        """Stop a source that failed."""
        with self._lock:
            first = self._mark(reads, error)
        if first:
            self._stop(reads)

    def _end(self, reads: SourceReads) -> None:
        """End a source; in a thread of its own."""
        try:
            self._end_source(reads)
        except Exception as exc:  # noqa: BLE001 - the load must not wait for a source that never ends
            self.fail(exc)

    def _end_source(self, reads: SourceReads) -> None:
        """Close the session of a source, give its chunks to the others, and end its lease."""
        if not self._closed and (reads.error is not None or reads.lease is None):
            self._on_loss(reads)
        safe = self._close_session(reads)
        with self._lock:
            if safe:
                self._give_back(reads)
            else:
                self._error = self._error or reads.error or self._still_writes(reads)
            reads.stopped = safe
            reads.ended = self._clock()
            self._changed.notify_all()
        end, _ = reads.source.release()
        with self._lock:
            reads.lease = reads.lease or end
            if reads.lease is LeaseEnd.DENIED:
                self._take_back(reads)
            self._changed.notify_all()
        if safe:
            reads.source.close()

    def _close_session(self, reads: SourceReads) -> bool:
        """Close the session; return whether nothing writes to the destinations any more."""
        try:
            reads.source.session.close()
        except ModelExpressError as exc:
            _log.debug("the session of %s was not closed: %s", reads.source.uri, exc)
            return False
        with self._lock:
            return self._changed.wait_for(lambda: not reads.threads, _STOP_SECONDS)

    def _give_back(self, reads: SourceReads) -> None:
        """Queue what a source has not read, with the lock held."""
        for chunk in (*reads.held, *reads.again):
            chunk.wrong = 0
            self.read_again += 1
            self._queue(chunk)
        reads.held.clear()
        reads.again.clear()

    def _take_back(self, reads: SourceReads) -> None:
        """Queue what a source has delivered, with the lock held: it cannot be trusted."""
        for chunk in reads.delivered:
            chunk.wrong = 0
            self._missing += 1
            self.arrived_bytes -= len(chunk.destination)
            self.reread_bytes += len(chunk.destination)
            self.read_again += 1
            self._queue(chunk)
        reads.delivered.clear()
        reads.reread_bytes += reads.arrived_bytes
        reads.arrived_bytes = 0

    def _queue(self, chunk: ChunkRead) -> None:
        self._left.appendleft(chunk)
        self._left_bytes += len(chunk.destination)
        self._work.notify_all()

    def _settle_leases(self, now: float) -> None:
        """Decide about leases whose workers do not answer, with the lock held."""
        for reads in self.sources:
            if reads.ended is not None and reads.lease is None and now - reads.ended > _SETTLE_SECONDS:
                reads.lease = LeaseEnd.UNKNOWN
            if reads.lease is LeaseEnd.UNKNOWN and not self._verify:
                self._take_back(reads)

    def _is_settled(self) -> bool:
        return all(each.lease is not None for each in self.sources if each.stopping and each.delivered)

    def _confirm_leases(self) -> bool:
        """End the leases of all sources, one after the other; return False if chunks must be read again.

        First all are asked whether their leases last: as long as none was ended, others can read the chunks of one
        whose lease does not.
        """
        with self._lock:
            delivering = [each for each in self.sources if each.delivered and not each.stopping]
        patience = _CONFIRM_SECONDS if self._verify else None
        if not all(self._settle(each, *each.source.check_lease(patience)) for each in delivering):
            return False
        for reads in delivering:
            if reads.stopping:
                continue
            if not self._settle(reads, *reads.source.release()):
                return False
            with self._lock:
                if self._mark(reads, None):
                    reads.lease = LeaseEnd.CONFIRMED
                    reads.stopped = True
        return True

    def _settle(self, reads: SourceReads, end: LeaseEnd, error: BackendError | None) -> bool:
        """Act on what a source says about its lease; return False if its chunks must be read again."""
        if error is None:
            return True
        believed = end is LeaseEnd.UNKNOWN and self._verify
        with self._lock:
            if not self._mark(reads, None if believed else error):
                return False  # it has failed meanwhile
            reads.lease = LeaseEnd.UNKNOWN if believed else LeaseEnd.DENIED
            if not believed:
                self._take_back(reads)
        self._stop(reads)
        if believed:
            _log.info("%s did not confirm its lease; the digests of its chunks were right: %s", reads.source.uri, error)
        return believed

    # -- threads that read --------------------------------------------------------------------------------------------

    def _run(self, reads: SourceReads) -> None:
        try:
            while (batch := self._take(reads)) is not None:
                self._read_batch(reads, batch)
        except BackendError as exc:
            self._lose(reads, exc)
        except (ModelExpressError, MemoryError) as exc:
            self.fail(exc)
        except Exception as exc:  # noqa: BLE001 - becomes our own error
            reason = f"the transport did not translate {type(exc).__name__}: {exc}"
            error = self._failure(reads, BackendError, reason, hint="report it to the authors of the transport")
            error.__cause__ = exc
            self._lose(reads, error)
        finally:
            with self._lock:
                reads.threads -= 1
                self._changed.notify_all()

    def _take(self, reads: SourceReads) -> list[ChunkRead] | None:
        """Return the next chunks for a source, when there are some; None if it gets no more."""
        with self._lock:
            while not (reads.stopping or self._ends):
                batch = self._next_batch(reads)
                if batch:
                    if not reads.held:
                        reads.progressed = self._clock()
                    reads.held.update(batch)
                    return batch
                self._changed.notify_all()  # this source may read what a slow one holds
                self._work.wait()
            return None

    def _next_batch(self, reads: SourceReads) -> list[ChunkRead]:
        if reads.again:
            return [reads.again.popleft()]
        now = self._clock()
        rates = sum(each.pace.rate(now) or 0.0 for each in self.sources if not each.stopping)
        limit = batch_bytes(reads.pace.rate(now), rates, self._left_bytes, _THREADS)
        batch: list[ChunkRead] = []
        nbytes = 0
        while self._left and len(batch) < _MAX_BATCH_CHUNKS:
            nbytes += len(self._left[0].destination)
            if batch and nbytes > limit:
                break
            batch.append(self._left.popleft())
            self._left_bytes -= len(batch[-1].destination)
        return batch

    def _read_batch(self, reads: SourceReads, batch: Sequence[ChunkRead]) -> None:
        open_positions = set(range(len(batch)))
        session = reads.source.session
        digests = [self._running_digest(chunk) for chunk in batch]
        ranges = [
            TensorRead(chunk.name, chunk.offset, chunk.destination, None if digest is None else digest.landed)
            for chunk, digest in zip(batch, digests, strict=True)
        ]
        for position in session.read(ranges):
            if position not in open_positions:
                reason = f"the transport says that it has read range {position!r}, which is not open"
                raise self._failure(reads, BackendError, reason, hint="report it to the authors of the transport")
            open_positions.remove(position)
            self._arrived(reads, batch[position], digests[position])
        if open_positions:
            reason = f"the transport has not read {len(open_positions)} of {len(batch)} ranges"
            raise self._failure(reads, BackendError, reason, hint="report it to the authors of the transport")

    def _running_digest(self, chunk: ChunkRead) -> RunningDigest | None:
        from modelexpress_core.transport.chunk_digests import RunningDigest

        return RunningDigest(chunk.destination) if self._verify and chunk.destination.device.type == "cpu" else None

    def _arrived(self, reads: SourceReads, chunk: ChunkRead, digest: RunningDigest | None) -> None:
        """Pass a chunk on to the thread that verifies digests, unless the session had it digested as it arrived."""
        digested = digest is not None and digest.nbytes == len(chunk.destination)
        error = None
        with self._lock:
            reads.progressed = now = self._clock()
            reads.pace.arrived(len(chunk.destination), now)
            reads.held.discard(chunk)
            reads.source.read_bytes += len(chunk.destination)
            if digest is not None and digested:
                error = self._settle_chunk(reads, chunk, right=digest.digest == chunk.digest)
            elif self._verify:
                self._unverified.append((reads, chunk))
                self._to_verify.notify()
                while len(self._unverified) > _MAX_UNVERIFIED and not (reads.stopping or self._ends):
                    self._room_to_verify.wait()
                reads.progressed = self._clock()
                return
            else:
                self._deliver(reads, chunk)
        if error is not None:
            self._lose(reads, error)
        self._on_arrival()

    def _settle_chunk(self, reads: SourceReads, chunk: ChunkRead, *, right: bool) -> BackendError | None:
        """Deliver a chunk or have it read again, with the lock held; return an error that ends its source."""
        if right:
            self._deliver(reads, chunk)
            return None
        return self._read_again(reads, chunk)

    # -- the thread that verifies -------------------------------------------------------------------------------------

    def _verify_all(self) -> None:
        from modelexpress_core.transport.chunk_digests import chunk_digests

        while True:
            with self._lock:
                while not self._unverified and not self._ends:
                    self._to_verify.wait()
                if self._ends:
                    return
                reads, chunk = self._unverified.popleft()
                self._room_to_verify.notify()
            try:
                begun = self._clock()
                right = chunk_digests(chunk.destination) == [chunk.digest]
                self.verify_seconds += self._clock() - begun
            except Exception as exc:  # noqa: BLE001 - the load must not wait for a digest that never comes
                self.fail(exc)
                return
            with self._lock:
                error = self._settle_chunk(reads, chunk, right=right)
            if error is not None:
                self._lose(reads, error)
            self._on_arrival()

    def _deliver(self, reads: SourceReads, chunk: ChunkRead) -> None:
        """Count a chunk that is in place, with the lock held."""
        self.arrived_bytes += len(chunk.destination)
        reads.arrived_bytes += len(chunk.destination)
        reads.delivered.append(chunk)
        self._missing -= 1
        if reads.lease is LeaseEnd.DENIED:
            self._take_back(reads)
        if not self._missing:
            self._changed.notify_all()

    def _read_again(self, reads: SourceReads, chunk: ChunkRead) -> BackendError | None:
        """Queue a chunk with a wrong digest, with the lock held: bits may change on the way.

        Returns the error of the source if the digest was wrong twice. Then others read the chunk.
        """
        chunk.wrong += 1
        reads.mismatches += 1
        reads.reread_bytes += len(chunk.destination)
        self.read_again += 1
        self.reread_bytes += len(chunk.destination)
        if chunk.wrong == 1 and not reads.stopping:
            reads.again.append(chunk)
            self._work.notify_all()
            return None
        wrong_twice = chunk.wrong > 1
        chunk.wrong = 0
        self._queue(chunk)
        if not wrong_twice:
            return None
        where = byte_range(chunk.offset, len(chunk.destination))
        return self._failure(
            reads,
            IntegrityError,
            f"{where} of {chunk.name} arrived twice with other bytes than the worker had when it offered them",
            cause="its weights changed without the offer being withdrawn, or a memory or a network is faulty",
            hint="restart that worker; MX_TRUSTED_PUBLISHERS and MX_DISCOVERY choose which workers are read",
        )

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> bool:
        """Stop and close all sources; return whether nothing writes to the destinations any more. May be called again.

        Workers that do not answer are left to their threads after a moment.
        """
        with self._lock:
            self._closed = True
            self._left.clear()
            self._unverified.clear()
            self._wake()
            confirmed = [each for each in self.sources if each.stopped and each.ended is None]
            to_stop = [each for each in self.sources if self._mark(each, None)]
        for reads in to_stop:
            self._stop(reads)
        for reads in confirmed:
            reads.source.close()
        with self._lock:
            sources = self.sources
            self._changed.wait_for(lambda: all(e.stopped or e.ended is not None for e in sources), 2 * _STOP_SECONDS)
            self._changed.wait_for(lambda: all(each.lease is not None for each in sources), _SETTLE_SECONDS)
            return all(each.stopped for each in sources)

    def fail(self, error: BaseException) -> None:
        """End the load with an error that is no source's."""
        with self._lock:
            self._error = self._error or error
            self._wake()

    def _wake(self) -> None:
        for waiting in (self._work, self._to_verify, self._room_to_verify, self._changed):
            waiting.notify_all()

    def _still_writes(self, reads: SourceReads) -> ModelExpressError:
        return ModelExpressError(
            f"a read of {reads.source.uri} goes on after its connection was closed", hint="end this process"
        )

    def _failure(self, reads: SourceReads, cls: type[_E], reason: str, *, hint: str, cause: str | None = None) -> _E:
        return cls(
            reason,
            uri=reads.source.uri,
            operation="read the tensors",
            provider=reads.source.provider,
            retryable=False,
            peer_at_fault=True,
            cause=cause,
            hint=hint,
        )

    @staticmethod
    def _start(run: Callable[[], None], operation: str) -> None:
        thread = threading.Thread(target=run, name=f"mx-peer-{next(_thread_numbers)}", daemon=True)
        start_thread(thread, operation)
