"""The reader's side: reads of one worker's memory, straight into place, or through buffers of the transport's own.

A read that has begun cannot be taken back. Over CMA the reading process copies the bytes itself, and over RDMA reads
end or fail by themselves, so both read straight into place. The end of a read needs an answer of the worker, also over
CMA; without one, the agent of the session is never called again, and so writes nothing. Over every other lane a worker
that is stopped may go on later, and write then: these reads go into buffers, and the bytes are copied once they have
arrived. Buffers of reads that never end are kept; see ``_quarantine``.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from attrs import define, field, frozen

from modelexpress_core.contracts.transport import TensorRead
from mx_nixl._agent import Agent, rows_of
from mx_nixl._allocations import HOST, Allocation, allocations_of, device_of, kind_of
from mx_nixl._description import AgentDescription
from mx_nixl._errors import (
    close_unsafe,
    is_disconnect,
    nixl_errors,
    out_of_range,
    read_timed_out,
    session_closed,
    withdrawn,
)
from mx_nixl._lanes import Lane
from mx_nixl._quarantine import KeptMemory, Quarantine

__all__ = ["BUFFER_BYTES", "NixlSession"]

_log = logging.getLogger(__name__)

#: Bytes that one read into place moves at most.
_READ_BYTES = 32 << 20

#: One buffer, how many a session has for each device, and how many one read uses at most: two threads may read at once.
_SLOT_BYTES = 4 << 20
_SLOTS = 16
_SLOTS_OF_READ = 8

#: What the buffers of a session take for each device.
BUFFER_BYTES = _SLOT_BYTES * _SLOTS

#: How long a thread sleeps before it asks for the state of its read, which moves the read on: first; at most in the
#: first second; and at most afterwards.
_MIN_SLEEP_SECONDS = 50e-6
_MAX_SLEEP_SECONDS = 200e-6
_LATE_SLEEP_SECONDS = 5e-3
_YOUNG_SECONDS = 1.0

#: How long ``close`` waits for reads into buffers to end; for reads into place; and for NIXL to return from a call, in
#: which it copies up to 32 MiB.
_BUFFERS_STOP_SECONDS = 1.0
_PLACES_STOP_SECONDS = 5.0
_CALL_SECONDS = 30.0

_READ = "read the tensors"


@frozen
class _Piece:
    """A part of a range that one read moves.

    Attributes:
        position: The range.
        address: First byte in the memory of the worker.
        device: The worker's device.
        destination: Where its bytes go.
    """

    position: int
    address: int
    device: int
    destination: torch.Tensor = field(repr=False)


@define(eq=False)
class _Transfer:
    """One read of NIXL.

    Attributes:
        handle: NIXL's own.
        memory: What it writes to.
        in_place: Whether that is no buffer of ours.
    """

    handle: Any
    memory: Sequence[torch.Tensor]
    in_place: bool


@define(eq=False)
class _Buffers:
    """Buffers for the reads of one session into the memory of one device.

    Attributes:
        memory: All of them.
        free: Numbers of those that no read uses.
    """

    memory: torch.Tensor
    free: list[int] = field(factory=lambda: list(range(_SLOTS)))

    def slot(self, number: int) -> torch.Tensor:
        """One buffer."""
        return self.memory[number * _SLOT_BYTES : (number + 1) * _SLOT_BYTES]


class NixlSession:
    """Reads the tensors of one worker. Thread-safe.

    Args:
        agent: An agent of this session's own, which knows the worker's.
        description: What the worker tells.
        lane: The way that bytes are meant to take. It says whether reads go straight into place.
        is_served: Whether the worker still serves its tensors, as far as this can be told; called before each read
            into place. Over CMA the worker has no part in a read, and could not refuse it.
        timeout_seconds: How long one read may take.
        uri: Redacted URI of the worker, for messages.
        quarantine: Keeps the memory of reads that do not end.

    Attributes:
        channel: The lane, and why it is not a faster one, for the report.
    """

    def __init__(
        self,
        agent: Agent,
        description: AgentDescription,
        *,
        lane: Lane,
        is_served: Callable[[], bool],
        timeout_seconds: float,
        uri: str,
        quarantine: Quarantine,
    ) -> None:
        self._agent = agent
        self._description = description
        self.channel = lane.channel
        self._lane = lane
        self._is_served = is_served
        self._timeout_seconds = timeout_seconds
        self._uri = uri
        self._quarantine = quarantine
        self._changed = threading.Condition()
        self._registering = threading.Lock()
        #: Over CMA a call copies all bytes, under a lock of UCX for which other threads would wait with a busy loop.
        self._posting = threading.Lock()
        self._registered: set[Allocation] = set()
        self._buffers: dict[int, _Buffers] = {}
        self._under_way: set[_Transfer] = set()
        self._read_bytes = 0
        self._read_seconds = 0.0
        self._reading_since = 0.0
        self._moving = 0
        self._copying = 0
        self._disconnected = False
        self._closed = False
        self._ended = False
        self._unsafe_bytes = 0

    def read(self, reads: Sequence[TensorRead]) -> Iterator[int]:
        """Read ranges in batches of up to 32 MiB, each with one read of NIXL."""
        pieces = [piece for position, each in enumerate(reads) for piece in self._pieces(position, each)]
        left = Counter(piece.position for piece in pieces)
        yield from (position for position in range(len(reads)) if not left[position])
        while pieces:
            batch = self._first_batch(pieces)
            moved = self._move(batch)
            del pieces[:moved]
            for piece in batch[:moved]:
                left[piece.position] -= 1
                if not left[piece.position]:
                    yield piece.position

    def _pieces(self, position: int, read: TensorRead) -> Iterator[_Piece]:
        length = len(read.destination)
        place = self._description.tensors.get(read.name)
        if place is None or read.offset < 0 or read.offset + length > place.nbytes:
            raise out_of_range(read.name, read.offset, read.offset + length, self._uri)
        step = _READ_BYTES if self._is_in_place(read.destination) else _SLOT_BYTES
        for start in range(0, length, step):
            destination = read.destination[start : start + step]
            yield _Piece(position, place.address + read.offset + start, place.device, destination)

    def _is_in_place(self, destination: torch.Tensor) -> bool:
        return self._lane.on_host if device_of(destination) == HOST else self._lane.on_device

    @staticmethod
    def _first_batch(pieces: Sequence[_Piece]) -> Sequence[_Piece]:
        """The first pieces that one read can move: of the same kinds of memory, and up to 32 MiB."""
        kinds = (device_of(pieces[0].destination), kind_of(pieces[0].device))
        nbytes = 0
        for count, piece in enumerate(pieces):
            nbytes += len(piece.destination)
            same = kinds == (device_of(piece.destination), kind_of(piece.device))
            if count and (nbytes > _READ_BYTES or not same):
                return pieces[:count]
        return pieces[:]

    def _move(self, batch: Sequence[_Piece]) -> int:
        """Move the first pieces of ``batch``; return how many."""
        with self._changed:
            if self._closed:
                raise session_closed(self._uri)
            self._moving += 1
        try:
            if self._is_in_place(batch[0].destination):
                return self._move_into_place(batch)
            return self._move_through_buffers(batch)
        finally:
            with self._changed:
                self._moving -= 1
                self._changed.notify_all()

    def _move_into_place(self, batch: Sequence[_Piece]) -> int:
        destinations = [piece.destination for piece in batch]
        self._register(destinations)
        if not self._is_served():
            raise withdrawn(self._uri)
        self._run(batch, destinations, in_place=True)
        return len(batch)

    def _move_through_buffers(self, batch: Sequence[_Piece]) -> int:
        device = batch[0].destination.device
        buffers = self._buffers_on(device)
        with self._changed:
            if not self._changed.wait_for(lambda: buffers.free or self._closed, self._timeout_seconds):
                raise read_timed_out(self._timeout_seconds, self._uri)
            count = min(len(batch), len(buffers.free), _SLOTS_OF_READ)
            slots, buffers.free = buffers.free[:count], buffers.free[count:]
        staged = [
            buffers.slot(number)[: len(piece.destination)] for number, piece in zip(slots, batch[:count], strict=True)
        ]
        try:
            self._run(batch[:count], staged, in_place=False)
            self._copy(staged, [piece.destination for piece in batch[:count]])
        finally:
            with self._changed:
                if not any(transfer.memory is staged for transfer in self._under_way):
                    buffers.free += slots
                    self._changed.notify_all()
        return count

    def _copy(self, staged: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor]) -> None:
        """Copy what has arrived, unless the session was closed meanwhile."""
        with self._changed:
            if self._closed:
                raise session_closed(self._uri)
            self._copying += 1
        try:
            for content, destination in zip(staged, destinations, strict=True):
                if destination.device.type == "cpu":  # torch would start threads, which wait in busy loops
                    ctypes.memmove(destination.data_ptr(), content.data_ptr(), len(content))
                else:
                    destination.copy_(content)
            if destinations[0].device.type != "cpu":
                torch.cuda.current_stream(destinations[0].device).synchronize()
        finally:
            with self._changed:
                self._copying -= 1
                self._changed.notify_all()

    def _run(self, batch: Sequence[_Piece], into: Sequence[torch.Tensor], *, in_place: bool) -> None:
        """Read ``batch`` into memory. If this raises, and the read has not ended, it stays in ``_under_way``."""
        device = device_of(into[0])
        local = [(each.data_ptr(), len(each), max(device, 0)) for each in into]
        remote = [(piece.address, len(piece.destination), max(piece.device, 0)) for piece in batch]
        with nixl_errors(_READ, self._uri):
            handle = self._agent.new_read(
                self._description.agent,
                (kind_of(device), rows_of(local)),
                (kind_of(batch[0].device), rows_of(remote)),
            )
        transfer = _Transfer(handle, into, in_place=in_place)
        with self._changed:
            if self._closed:
                raise session_closed(self._uri)
            if not self._under_way:
                self._reading_since = time.monotonic()
            self._under_way.add(transfer)
        try:
            with nixl_errors(_READ, self._uri):
                self._wait(handle)
        except BaseException:
            if self._has_ended(transfer):
                self._forget(transfer)
            raise
        self._forget(transfer)
        with self._changed:
            self._read_bytes += sum(map(len, into))

    def _wait(self, handle: Any) -> None:  # noqa: ANN401 - NIXL has no annotations
        sleep = _MIN_SLEEP_SECONDS
        try:
            with self._posting:
                self._check_patience(0.0)
                begun = time.monotonic()
                done = self._agent.post(handle)
            while not done:
                waited = time.monotonic() - begun
                self._check_patience(waited)
                time.sleep(sleep)
                sleep = min(2 * sleep, _MAX_SLEEP_SECONDS if waited < _YOUNG_SECONDS else _LATE_SLEEP_SECONDS)
                done = self._agent.is_done(handle)
        except Exception as exc:
            self._disconnected = self._disconnected or is_disconnect(exc)
            raise

    def _check_patience(self, waited: float) -> None:
        if self._closed:
            raise session_closed(self._uri)
        if waited > self._timeout_seconds:
            raise read_timed_out(self._timeout_seconds, self._uri)

    def _has_ended(self, transfer: _Transfer) -> bool:
        """Whether a read has a final state. The end of the connection ends all of them."""
        if self._disconnected:
            return True
        try:
            return self._agent.is_done(transfer.handle)
        except Exception as exc:  # noqa: BLE001 - NIXL's exceptions have no common base
            self._disconnected = is_disconnect(exc)
            return type(exc).__name__ not in _NOT_FINAL

    def _forget(self, transfer: _Transfer) -> None:
        """Forget a read that has ended."""
        with self._changed:
            if transfer in self._under_way:
                self._under_way.remove(transfer)
                if not self._under_way:
                    self._read_seconds += time.monotonic() - self._reading_since
        with contextlib.suppress(Exception):  # the agent frees it later
            transfer.handle.release()

    def _register(self, tensors: Sequence[torch.Tensor]) -> None:
        """Register the allocations that hold ``tensors``, once."""
        with self._registering:
            new = allocations_of(tensors) - self._registered
            if new:
                device = next(iter(new))[2]
                rows = rows_of([(start, end - start, max(where, 0)) for start, end, where in new])
                with nixl_errors("register memory for the tensors", self._uri):
                    self._agent.register(kind_of(device), rows)
                self._registered |= new

    def _buffers_on(self, device: torch.device) -> _Buffers:
        """The buffers on ``device``, which are made at first use."""
        number = HOST if device.type == "cpu" else device.index or 0
        with self._registering:
            if number not in self._buffers:
                memory = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)
                if device.type != "cpu":
                    torch.cuda.synchronize(device)  # kernels may still use the memory that the allocator gave
                rows = rows_of([(memory.data_ptr(), BUFFER_BYTES, max(number, 0))])
                with nixl_errors("register buffers", self._uri):
                    self._agent.register(kind_of(number), rows)
                self._buffers[number] = _Buffers(memory)
            return self._buffers[number]

    def close(self) -> None:
        """End reads in other threads, wait a few seconds for those of NIXL, and destroy the agent.

        Raises:
            BackendError: A read into place has not ended. Its memory is kept, and must not be used.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._copying)
            self._changed.wait_for(lambda: not self._moving, _CALL_SECONDS)
            first, self._ended = not self._ended, True
        if first:
            self._end()
            if slow := self._lane.explain_slowness(self._read_bytes, self._read_seconds):
                _log.warning("reading %s was slow: %s", self._uri, slow)
        if self._unsafe_bytes:
            raise close_unsafe(self._unsafe_bytes, self._uri)

    def _end(self) -> None:
        in_place = any(transfer.in_place for transfer in list(self._under_way))
        patient = in_place and not self._lane.in_calls
        deadline = time.monotonic() + (_PLACES_STOP_SECONDS if patient else _BUFFERS_STOP_SECONDS)
        while not self._all_ended() and time.monotonic() < deadline:
            time.sleep(_LATE_SLEEP_SECONDS)
        if self._all_ended():
            self._destroy()
            return
        if self._lane.in_calls and not self._moving:
            handles = [transfer.handle for transfer in self._under_way]
            buffers = [each.memory for each in self._buffers.values()]
            self._under_way.clear()
            self._quarantine.abandon((self._agent, handles, buffers), self._uri)
            return
        with self._changed:
            places = [each for transfer in self._under_way if transfer.in_place for each in transfer.memory]
        self._unsafe_bytes = sum(map(len, places))
        buffers = [each.memory for each in self._buffers.values()]
        kept = KeptMemory(
            self._unsafe_bytes + sum(map(len, buffers)),
            self._uri,
            (places, buffers),
            self._all_ended,
            self._destroy,
        )
        self._quarantine.keep(kept)

    def _all_ended(self) -> bool:
        """Whether no read is under way; forgets those that have ended."""
        with self._changed:
            if self._moving:
                return False
            under_way = list(self._under_way)
        for transfer in under_way:
            if self._has_ended(transfer):
                self._forget(transfer)
        return not self._under_way

    def _destroy(self) -> None:
        with contextlib.suppress(Exception):  # NIXL forgets a worker that is gone by itself
            self._agent.remove(self._description.agent)
        self._agent.close()
        self._buffers.clear()


#: Exceptions of a read that NIXL raises without knowing how it ended.
_NOT_FINAL = frozenset({"nixlNotFoundError", "nixlInvalidParamError", "BackendError"})
