"""Reads of one worker's tensors, chunk by chunk, with the digest of each chunk verified where it arrived."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from attrs import define

from modelexpress_core.contracts.transport import PeerSession, TensorRead
from modelexpress_core.errors import BackendError, DeadlineError, IntegrityError, ModelExpressError
from modelexpress_core.messages import byte_range
from modelexpress_core.resources import start_thread

if TYPE_CHECKING:
    import torch

__all__ = ["ChunkRead", "PeerReader"]

_E = TypeVar("_E", bound=BackendError)

_thread_numbers = itertools.count(1)

#: Threads that read, so that one verifies while the other waits for bytes.
_THREADS = 2

#: Chunks that a transport gets at a time, of 4 MiB each.
_BATCH_CHUNKS = 8

_CHECK_SECONDS = 0.2

#: Reads that still run this long after their session was closed are reported.
_STOP_SECONDS = 60.0


@define
class ChunkRead:
    """One chunk of a tensor.

    Attributes:
        name: Name of the tensor.
        offset: First byte.
        destination: Where its bytes go: one dimension of uint8.
        digest: CRC-64/NVME of its bytes, as the worker took it when it offered the tensor.
        wrong: How often it arrived with another digest.
    """

    name: str
    offset: int
    destination: torch.Tensor
    digest: int
    wrong: int = 0


class PeerReader:
    """Reads chunks over one session. Closing it ends reads in other threads.

    Args:
        session: The connection; the reader closes it.
        uri: Redacted URI of the worker, for messages.
        provider: Name of the transport, for messages.
        stall_seconds: The load fails if no chunk arrives for this long.
        verify: Whether digests are compared.
        on_arrival: Called by the reading threads after each chunk.

    Attributes:
        arrived_bytes: Bytes in place, with the right digests.
        mismatches: Chunks that arrived with a wrong digest; each counts every time.
        read_again: Chunks that were read once more, because their digest was wrong.
        reread_bytes: Their bytes.
        threads: How many threads read.
        verify_seconds: Time for digests, of all threads together.
    """

    def __init__(
        self,
        session: PeerSession,
        *,
        uri: str,
        provider: str,
        stall_seconds: float,
        verify: bool,
        on_arrival: Callable[[], None],
    ) -> None:
        self.arrived_bytes = self.mismatches = self.read_again = self.reread_bytes = self.threads = 0
        self.verify_seconds = 0.0
        self._session = session
        self._uri = uri
        self._provider = provider
        self._stall_seconds = stall_seconds
        self._verify = verify
        self._on_arrival = on_arrival
        self._changed = threading.Condition()
        self._left: deque[ChunkRead] = deque()
        self._reading = 0
        self._error: BaseException | None = None
        self._progressed_at = time.monotonic()
        self._closed = False

    def read(self, chunks: Sequence[ChunkRead]) -> None:
        """Return when every chunk is in place and has its digest.

        Raises:
            IntegrityError: A chunk arrived twice with a wrong digest.
            DeadlineError: Nothing arrived for too long.
            BackendError: The transport failed.
        """
        with self._changed:
            self._left.extend(chunks)
            self._progressed_at = time.monotonic()
            self.threads = min(_THREADS, max(1, len(chunks)))
            self._reading = self.threads
        started = 0
        try:
            while started < self.threads:
                thread = threading.Thread(target=self._run, name=f"mx-peer-{next(_thread_numbers)}", daemon=True)
                start_thread(thread, "read the tensors of another worker")
                started += 1
        finally:
            with self._changed:
                self._reading -= self.threads - started
        with self._changed:
            while self._reading and self._error is None:
                self._changed.wait(_CHECK_SECONDS)
                silent = time.monotonic() - self._progressed_at
                if silent > self._stall_seconds and self._error is None:
                    self._error = self._stalled(silent)
            error = self._error
        if error is not None:
            raise error

    def close(self) -> bool:
        """Close the session; return whether nothing writes to the destinations any more. Further calls do nothing."""
        with self._changed:
            self._left.clear()
            if self._closed:
                return not self._reading
            self._closed = True
        try:
            self._session.close()
        except ModelExpressError:
            return False
        with self._changed:
            return self._changed.wait_for(lambda: not self._reading, _STOP_SECONDS)

    def _run(self) -> None:
        try:
            while (batch := self._take()) is not None:
                self._read_batch(batch)
        except ModelExpressError as exc:
            self._fail(exc)
        except MemoryError as exc:
            self._fail(exc)
        except Exception as exc:  # noqa: BLE001 - becomes our own error
            reason = f"the transport did not translate {type(exc).__name__}: {exc}"
            error = self._failure(BackendError, reason, hint="report it to the authors of the transport")
            error.__cause__ = exc
            self._fail(error)
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()

    def _take(self) -> list[ChunkRead] | None:
        with self._changed:
            if self._error is not None or not self._left:
                return None
            return [self._left.popleft() for _ in range(min(_BATCH_CHUNKS, len(self._left)))]

    def _read_batch(self, batch: Sequence[ChunkRead]) -> None:
        from modelexpress_core.transport.chunk_digests import chunk_digests

        open_positions = set(range(len(batch)))
        for position in self._session.read([TensorRead(each.name, each.offset, each.destination) for each in batch]):
            if position not in open_positions:
                reason = f"the transport says that it has read range {position!r}, which is not open"
                raise self._failure(BackendError, reason, hint="report it to the authors of the transport")
            open_positions.remove(position)
            chunk = batch[position]
            begun = time.monotonic()
            right = not self._verify or chunk_digests(chunk.destination) == [chunk.digest]
            with self._changed:
                self.verify_seconds += time.monotonic() - begun
                self._progressed_at = time.monotonic()
                if right:
                    self.arrived_bytes += len(chunk.destination)
                else:
                    self._read_again(chunk)
            self._on_arrival()
        if open_positions:
            reason = f"the transport has not read {len(open_positions)} of {len(batch)} ranges"
            raise self._failure(BackendError, reason, hint="report it to the authors of the transport")

    def _read_again(self, chunk: ChunkRead) -> None:
        """Queue a chunk once more, with the lock held: bits may change on the way."""
        chunk.wrong += 1
        self.mismatches += 1
        if chunk.wrong > 1:
            where = byte_range(chunk.offset, len(chunk.destination))
            raise self._failure(
                IntegrityError,
                f"{where} of {chunk.name} arrived twice with other bytes than the worker had when it offered them",
                cause="its weights changed without the offer being withdrawn, or a memory or a network is faulty",
                hint="restart that worker; MX_TRUSTED_PUBLISHERS and MX_DISCOVERY choose which workers are read",
            )
        self.read_again += 1
        self.reread_bytes += len(chunk.destination)
        self._left.append(chunk)

    def _stalled(self, seconds: float) -> DeadlineError:
        return self._failure(
            DeadlineError,
            f"no chunk arrived for {seconds:.0f} s",
            cause="the worker hangs or is stopped, or the network to it is gone",
            hint="check the worker; MX_STALL_SECONDS sets how long to wait",
        )

    def _failure(self, cls: type[_E], reason: str, *, hint: str, cause: str | None = None) -> _E:
        return cls(
            reason,
            uri=self._uri,
            operation="read the tensors",
            provider=self._provider,
            retryable=False,
            peer_at_fault=True,
            cause=cause,
            hint=hint,
        )

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._left.clear()
            self._changed.notify_all()
