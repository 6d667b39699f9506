"""A load from the memory of a worker that holds the same tensors in the same layout."""

from __future__ import annotations

import time
from collections.abc import Sequence

from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer
from modelexpress_core.contracts.transport import PeerSession, TensorLayout, TensorRead
from modelexpress_core.errors import IntegrityError, NotFoundError, UnsupportedError
from modelexpress_core.events import LoadProgress
from modelexpress_core.loads.context import LoadContext
from modelexpress_core.loads.destination import Destination
from modelexpress_core.loads.load import Load, peak_rss_bytes
from modelexpress_core.messages import listed
from modelexpress_core.plugins import TRANSPORT
from modelexpress_core.report import LoadReport
from modelexpress_core.transport.layouts import tensor_layouts

__all__ = ["PeerLoad"]

_COMPARE = "compare the tensors"


class PeerLoad(Load):
    """Tensors are compared, leased, read into place, and trusted once the worker confirms the lease.

    Args:
        candidate: The worker.
        context: Settings and plugins.
        destination: A destination with run-time tensors.
        request: The request; the worker must hold its identity.
    """

    def __init__(
        self, candidate: Candidate, context: LoadContext, destination: Destination, request: LoadRequest
    ) -> None:
        super().__init__(candidate, context, destination)
        self._peer = candidate.peer or _expected_peer(request)
        self._session: PeerSession | None = None
        self._planned_bytes = 0
        self._arrived_bytes = 0
        self._reads: tuple[TensorRead, ...] = ()

    def open(self) -> None:
        """Connect, compare the layouts of both sides, and lease the memory of the worker."""
        self._registered, transport = self._plugins.open(TRANSPORT, self._uri, self._context.environ)
        self._closing.callback(transport.close)
        self._session = transport.connect(self._peer)
        self._closing.callback(self._session.close)
        tensors = self.destination.run_time_tensors()
        if tensors is None:
            reason = "the destination takes tensors of a checkpoint, but a worker holds those of an engine"
            raise UnsupportedError(reason, uri=str(self._uri), operation=_COMPARE)
        own = tensor_layouts(tensors)
        self._compare(own, self._session.layouts)
        # Tied tensors share memory, and are read once.
        self._reads = tuple(TensorRead(each.name, tensors[each.name]) for each in own if not each.same_memory_as)
        self._planned_bytes = sum(read.destination.nbytes for read in self._reads)
        self._planning_done = True
        self._session.lease()
        self._announce(
            provider=self._registered.provider.name, files=0, tensors=len(own), size_bytes=self._planned_bytes
        )

    def _compare(self, own: Sequence[TensorLayout], theirs: Sequence[TensorLayout]) -> None:
        ours_by_name = {layout.name: layout.canonical for layout in own}
        theirs_by_name = {layout.name: layout.canonical for layout in theirs}
        if ours_by_name == theirs_by_name and len(theirs) == len(theirs_by_name):
            return
        names = {*ours_by_name, *theirs_by_name}
        differing = sorted(name for name in names if ours_by_name.get(name) != theirs_by_name.get(name))
        raise NotFoundError(
            f"the worker holds {len(differing)} tensors in another layout, or not at all: {listed(differing)}",
            uri=str(self._uri),
            operation=_COMPARE,
            provider=self._registered.provider.name,
            cause="it runs another model, or another version of the engine",
            hint="compare the identities of both workers",
        )

    def fetch(self) -> None:
        """Read every tensor into place; afterwards the worker confirms that its memory did not change."""
        assert self._session is not None  # noqa: S101 - for the type checker: the load is open
        self.destination.touch()
        left = {read.name: read.destination.nbytes for read in self._reads}
        for completion in self._session.read(self._reads):
            expected = left.pop(completion.name, None)
            if expected != completion.bytes:
                reason = f"the transport delivered {completion.bytes} bytes of {completion.name}, not {expected or 0}"
                raise self._transport_error(reason)
            self._arrived_bytes += completion.bytes
            self._progress.arrived()
        if left:
            raise self._transport_error(f"the transport did not deliver {len(left)} tensors: {listed(sorted(left))}")
        self._session.release()

    def _transport_error(self, reason: str) -> IntegrityError:
        return IntegrityError(
            reason,
            uri=str(self._uri),
            operation="read the tensors",
            provider=self._registered.provider.name,
            hint=f"report it to the authors of {self._registered.label}",
        )

    def _stop(self, exc: BaseException) -> bool:  # noqa: ARG002 - a session needs no reason
        self._closing.close()  # a closed session writes to no memory
        return True

    def _progress_event(self) -> LoadProgress:
        seconds = time.monotonic() - self._begun
        rate = self._arrived_bytes / seconds if seconds else 0.0
        left = self._planned_bytes - self._arrived_bytes
        return LoadProgress(
            load_id=self._id,
            uri=str(self._uri),
            bytes_done=self._arrived_bytes,
            bytes_planned=self._planned_bytes,
            planning_done=self._planning_done,
            seconds=seconds,
            bytes_per_second=rate,
            eta_seconds=left / rate if rate else None,
            retries=0,
        )

    def _account(self) -> LoadReport:
        ended = time.monotonic()
        return LoadReport(
            uri=str(self._uri),
            storage={"plugin": self._registered.plugin.name, "version": self._registered.plugin.version},
            tensors=len(self._reads),
            tensors_in_checkpoint=0,
            files=0,
            bytes_needed=self._planned_bytes,
            bytes_fetched=self._arrived_bytes,
            bytes_reread=0,
            bytes_materialised=0,
            header_bytes=0,
            seconds=ended - self._begun,
            phase_seconds={"open": self._opened - self._begun, "load": ended - self._opened},
            goodput_bytes_per_second=self._planned_bytes / (ended - self._begun),
            requests=len(self._reads),
            retries=0,
            concurrency=1,
            verified={"versions": 0, "sizes": 0, "digests": 0},
            materialised_operations={},
            meta_destinations=0,
            peak_rss_bytes=peak_rss_bytes(),
        )


def _expected_peer(request: LoadRequest) -> Peer:
    """Return the peer that is expected at a worker of which only the address is known."""
    source_id = request.identity.source_id if request.identity is not None else ""
    return Peer(source_id=source_id, worker_id="", worker_rank=request.worker_rank)
