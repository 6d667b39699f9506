"""Copies that were recorded and may not be done: scheduled in order, fetched in batches, completed on demand.

A copy passes through four states:

1. **Recorded**: source and destination are noted. This is all that the loading code waits for.
2. **Scheduled**: its memory is known and compared with that of earlier copies. Copies to the same memory are completed
   first, so that order is preserved.
3. **Submitted**: the engine has its reads.
4. **Done**: every byte arrived.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from attrs import frozen

from modelexpress_core.checkpoint import TensorInfo
from modelexpress_core.errors import IncompleteLoadError, PlacementError
from modelexpress_core.fetch import FetchEngine, Ticket
from modelexpress_core.messages import listed
from modelexpress_core.placement.coverage import Coverage
from modelexpress_core.placement.deferred import Source
from modelexpress_core.placement.memory import has_memory, pinned_memory, region_of
from modelexpress_core.placement.pending_memory import PendingMemory
from modelexpress_core.placement.plan import Copy, ReadPlanner
from modelexpress_core.placement.torch_private import BypassModes, DisableTorchFunction

__all__ = ["CopyLimits", "PendingCopies"]

#: Completed copies are also kept up to this many times the rest of the last time, so that copies under way are seldom
#: searched.
_PURGE_GROWTH = 2


@frozen
class CopyLimits:
    """When recorded copies are handed on, and completed ones forgotten.

    Attributes:
        batch_copies: Recorded copies are handed to the engine when there are so many ...
        batch_bytes: ... or when they have so many bytes.
        purge_copies: Completed copies keep their destinations alive. They are forgotten when so many are kept ...
        purge_bytes: ... or when they have so many bytes.
    """

    batch_copies: int = 256
    batch_bytes: int = 64 << 20
    purge_copies: int = 1024
    purge_bytes: int = 256 << 20


class PendingCopies:
    """The copies of one load. All methods but ``record`` are called with ``lock`` held.

    Args:
        engine: Fetches them.
        coverage: Notes which memory is written, if that has to be known.
        lock: The lock of the load.
        fresh: Whether nothing was ever written to the destinations.

    Attributes:
        needed_bytes: Bytes of all elements that were asked for, each counted once per use.
        whole_copies_only: Whether code only asks for whole tensors to be copied, and watches no operations: then
            destinations live as long as the load.
        ended: Whether the load has ended.
        limits: Of every load. Tests lower them, so that small programs reach them.
    """

    limits: ClassVar[CopyLimits] = CopyLimits()

    def __init__(self, engine: FetchEngine, coverage: Coverage | None, lock: threading.RLock, *, fresh: bool) -> None:
        self.needed_bytes = 0
        self.whole_copies_only = True
        self.ended = False
        self._engine = engine
        self._planner = ReadPlanner(
            engine.chunk_bytes,
            engine.capabilities.request_cost_bytes,
            reads_runs=engine.capabilities.read_runs,
            run_cost_bytes=engine.capabilities.run_cost_bytes,
            force_staging=engine.force_staging,
        )
        self._coverage = coverage
        self._fresh = fresh
        self._lock = lock
        self._recorded: deque[tuple[Source, torch.Tensor, torch.Tensor]] = deque()
        self._resolving = False
        self._scheduled: PendingMemory[Copy] = PendingMemory()
        self._scheduled_bytes = 0
        self._unsubmitted: list[Copy] = []
        self._unsubmitted_bytes = 0
        self._batch_copies = self.limits.batch_copies
        self._batch_bytes = self.limits.batch_bytes
        self._purge_copies = self.limits.purge_copies
        self._purge_bytes = self.limits.purge_bytes
        self._fault: BaseException | None = None
        self._pinned = False

    def __len__(self) -> int:
        return len(self._scheduled)

    def exist(self) -> bool:
        """Whether any copy may not be done."""
        return bool(self._recorded or len(self._scheduled))

    def record(self, source: Source, view: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy ``view`` of ``source`` to ``destination`` in the background.

        The copy is only noted here. What follows from it takes less time for many copies together, and is done before
        anything else asks which copies are pending.
        """
        if self.ended:
            self.check_usable(source.info)
        # The memory as it is now: the tensor itself may get other memory before this is planned or done.
        if type(destination) is torch.Tensor:
            memory = destination.detach()
        else:
            with DisableTorchFunction():
                memory = destination.detach()
        self._recorded.append((source, view, memory))
        self._unsubmitted_bytes += view.nbytes
        copies = len(self._recorded) + len(self._unsubmitted)
        if self._unsubmitted_bytes >= self._batch_bytes or copies >= self._batch_copies:
            with self._lock:
                self.submit()

    def check_usable(self, info: TensorInfo) -> None:
        """Raise if the load has ended.

        Raises:
            PlacementError: It has.
        """
        if self.ended:
            message = f"the deferred tensor {info.name} is used after its load has ended"
            raise PlacementError(
                message, tensor=info.name, hint="copy or clone it inside the with block of deferred_weights"
            )

    # -- completing ---------------------------------------------------------------------------------------------------

    def settle(self, tensor: torch.Tensor) -> None:
        """Complete the copies to memory of ``tensor``."""
        if tensor.device.type == "meta":
            return
        self._resolve_recorded()
        if not len(self._scheduled):
            return
        region = region_of(tensor) if has_memory(tensor) else None
        if region is not None:
            self._complete(self._scheduled.overlapping(region))
        elif not has_memory(tensor):  # its memory is unknown
            self._complete(self._scheduled.owners())

    def settle_all(self) -> None:
        """Complete all copies."""
        self._resolve_recorded()
        self._complete(self._scheduled.owners())

    def finish(self) -> None:
        """Complete all copies and stop the engine.

        Raises:
            IncompleteLoadError: A copy is not done although nothing failed.
        """
        self.submit()
        self._engine.finish()
        self._resolve_recorded()
        lost = sorted({copy.info.name for copy in self._scheduled.owners() if not copy.done})
        if lost:
            message = f"{len(lost)} tensors were recorded and not fetched: {listed(lost)}"
            cause = "the loading code caught an error that ended the recording of other tensors"
            raise IncompleteLoadError(message, missing=lost, cause=cause, hint="let that error pass")

    def end(self) -> None:
        """Refuse further copies, and keep nothing alive for the recorded ones."""
        self.ended = True
        self._scheduled = PendingMemory()
        self._unsubmitted = []
        self._recorded.clear()

    def wrote(self, tensor: torch.Tensor) -> None:
        """Note that all elements of ``tensor`` were written."""
        if self._coverage is not None:
            self._coverage.wrote(tensor)

    def _complete(self, copies: Iterable[Copy]) -> None:
        waiting = [copy for copy in copies if not copy.done]
        if waiting:
            self.submit(urgent=True)
            self._engine.wait(waiting)

    # -- fetching -----------------------------------------------------------------------------------------------------

    def submit(self, *, urgent: bool = False) -> None:
        """Hand all recorded copies to the engine."""
        self._resolve_recorded()
        copies, self._unsubmitted, self._unsubmitted_bytes = self._unsubmitted, [], 0
        self.fetch(copies, urgent=urgent)

    def fetch(self, copies: Sequence[Copy], *, urgent: bool) -> None:
        """Hand ``copies``, whose destinations nothing else uses, to the engine."""
        if self._fault is not None:
            raise self._fault
        if not copies:
            return
        try:
            with BypassModes():
                self._engine.submit(self._planner.batches(copies), urgent=urgent)
        except BaseException as exc:
            self._fault = exc  # none of these copies will be done, even if the caller catches this
            raise

    def fetch_now(self, copy: Copy) -> None:
        """Fetch ``copy``, whose destination nothing else uses, and return when it is done."""
        self.needed_bytes += copy.needed_bytes
        self.submit()  # unsubmitted copies are fetched meanwhile
        self.fetch([copy], urgent=True)
        self._engine.wait([copy])

    def wait(self, ticket: Ticket) -> None:
        """Return when every byte of ``ticket`` arrived."""
        if not ticket.done:
            self._engine.wait([ticket])

    # -- scheduling ---------------------------------------------------------------------------------------------------

    def _resolve_recorded(self) -> None:
        """Schedule the recorded copies, in order."""
        if not self._recorded or self._resolving:
            return
        if self._fault is not None:
            raise self._fault
        self._resolving = True
        try:
            # Copies recorded meanwhile come after all of these.
            recorded = [self._recorded.popleft() for _ in range(len(self._recorded))]
            for source, view, memory in recorded:
                self._schedule(source, view, memory)
        except BaseException as exc:
            self._fault = exc  # the rest will not be done, even if the caller catches this
            raise
        finally:
            self._resolving = False
        if self.whole_copies_only:  # whether destinations overlap has to be known until the end
            return
        if len(self._scheduled) >= self._purge_copies or self._scheduled_bytes >= self._purge_bytes:
            self._purge()

    def _schedule(self, source: Source, view: torch.Tensor, memory: torch.Tensor) -> None:
        """Find out which memory a copy goes to, and complete earlier copies to that memory."""
        source.used = True
        region = region_of(memory)
        if region is None:
            return
        if memory.is_cuda and not self._pinned:
            self._pinned = True
            self._engine.staging.allocate_with(pinned_memory)
        scheduled = self._scheduled
        earlier = scheduled.overlapping(region) if len(scheduled) else ()
        copy = Copy(source.info, view, memory)
        copy.stable = self.whole_copies_only and not earlier
        copy.fresh = self._fresh
        if earlier:
            self._complete(earlier)
            for overwritten in earlier:
                overwritten.stable = False
        self.needed_bytes += copy.needed_bytes
        self._scheduled_bytes += copy.needed_bytes
        scheduled.add(region, copy)
        self._unsubmitted.append(copy)
        if self._coverage is not None:
            self._coverage.wrote_region(region)

    def _purge(self) -> None:
        """Forget the copies that are done."""
        self._scheduled.purge()
        self._scheduled_bytes = sum(copy.needed_bytes for copy in self._scheduled.owners())
        self._purge_copies = max(self.limits.purge_copies, _PURGE_GROWTH * len(self._scheduled))
        self._purge_bytes = max(self.limits.purge_bytes, _PURGE_GROWTH * self._scheduled_bytes)
