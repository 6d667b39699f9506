"""A load from the memory of workers that hold the same tensors in the same layout."""

from __future__ import annotations

import logging
import threading
import time

from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.errors import BackendError, ModelExpressError, UnsupportedError
from modelexpress_core.events import LoadProgress
from modelexpress_core.loads.candidate_queue import CandidateQueue, peer_of
from modelexpress_core.loads.context import LoadContext
from modelexpress_core.loads.destination import Destination
from modelexpress_core.loads.load import Load, peak_rss_bytes
from modelexpress_core.loads.peer_chunks import COMPARE, ReadPlan
from modelexpress_core.loads.peer_reading import PeerReader
from modelexpress_core.loads.peer_source import PeerSource
from modelexpress_core.loads.source_reads import SourceReads
from modelexpress_core.report import LoadReport, SourceReport
from modelexpress_core.settings import from_env
from modelexpress_core.sources.metrics import source_metrics
from modelexpress_core.sources.settings import DiscoverySettings

__all__ = ["PeerLoad"]

_log = logging.getLogger(__name__)


class PeerLoad(Load):
    """Tensors are compared, leased and read into place, their digests verified, and leases confirmed by the workers.

    The load opens the first worker, and begins to read from it; others with the same tensors join while it reads. As
    long as one of them is left, the load goes on: chunks that are verified stay, others are read from those that are
    left, or from the next worker.

    Args:
        candidate: The first worker.
        context: Settings and plugins.
        destination: A destination with run-time tensors.
        request: The request; the worker must hold its identity.
        left: The other candidates, from which the load takes more workers. Those that fail are dropped.
    """

    def __init__(
        self,
        candidate: Candidate,
        context: LoadContext,
        destination: Destination,
        request: LoadRequest,
        left: CandidateQueue,
    ) -> None:
        super().__init__(candidate, context, destination)
        self._candidate = candidate
        self._peer = peer_of(candidate, request)
        self._request = request
        self._candidates = left
        identity = request.identity
        same = identity is not None and identity.source_id == self._peer.source_id
        self._content_version = identity.content_version if identity and same else ""
        settings = from_env(DiscoverySettings, context.environ)
        self._selector = settings.selector
        self._most_sources = settings.sources
        self._choosing = threading.Lock()
        self._in_use: list[Candidate] = [candidate]
        self._slow: list[Candidate] = []
        self._unlike: list[Candidate] = []
        self._reader: PeerReader | None = None
        self._first: PeerSource
        self._plan: ReadPlan

    def open(self) -> None:
        """Compare the layouts of both sides, lease the memory of the first worker, and connect."""
        tensors = self.destination.run_time_tensors()
        if tensors is None:
            reason = "the destination takes tensors of a checkpoint, but a worker holds those of an engine"
            raise UnsupportedError(reason, uri=str(self._uri), operation=COMPARE)
        self._first = PeerSource(self._candidate, self._request, self._context)
        self._closing.callback(self._close_first)
        self._plan = ReadPlan(tensors, self._first.uri)
        self._plan.cut(self._first.describe(self._plan))
        self._first.connect()
        self._planning_done = True
        self._announce(
            provider=self._first.provider,
            files=0,
            tensors=len(self._plan.layouts),
            size_bytes=self._plan.nbytes,
        )

    def fetch(self) -> None:
        """Read every tensor into place; afterwards each worker confirms that its memory did not change."""
        self._first.renew()  # it is alive, right before the first read
        self.destination.touch()
        settings = self._context.settings
        self._reader = reader = PeerReader(
            self._plan.chunks,
            stall_seconds=settings.stall_seconds,
            verify=settings.verify_digests,
            on_arrival=self._progress.arrived,
            on_loss=self._lost,
        )
        self._closing.callback(reader.close)
        reader.add(self._first)
        for _ in range(min(self._most_sources, len(self._plan.chunks)) - 1):
            self._add_source(reader)
        reader.read()
        self._plan.scatter()

    # -- more workers -------------------------------------------------------------------------------------------------

    def _add_source(self, reader: PeerReader) -> None:
        """Let the next worker join, if there is one, in a thread of its own."""
        candidate = self._next_worker()
        if candidate is not None:
            reader.open_more(lambda: self._join(reader, candidate))

    def _next_worker(self) -> Candidate | None:
        """Take the best worker that holds the same tensors, and that the load does not read already.

        One that was stopped because it was slow is taken again if no other is left.
        """
        with self._choosing:
            workers = {self._worker_of(each) for each in self._in_use} - {""}

            def is_wanted(candidate: Candidate) -> bool:
                peer = peer_of(candidate, self._request)
                return (
                    peer.source_id == self._peer.source_id
                    and peer.worker_rank == self._peer.worker_rank
                    and peer.worker_id not in workers
                )

            candidate = self._candidates.take_worker(is_wanted)
            if candidate is None and self._slow and self._reader is not None and not self._reader.active:
                candidate = self._slow.pop()
            if candidate is not None:
                self._in_use.append(candidate)
            return candidate

    def _worker_of(self, candidate: Candidate) -> str:
        """The id of a worker; the first one's is known although its URI may not name it."""
        return self._first.worker_id if candidate is self._candidate else peer_of(candidate, self._request).worker_id

    def _join(self, reader: PeerReader, candidate: Candidate | None) -> None:
        """Open the first worker that can be opened, from ``candidate`` on, and read from it too."""
        while candidate is not None and not reader.closed:
            try:
                source = self._open_source(candidate)
                if source is not None:
                    self._add(reader, source)
                    return
            except ModelExpressError as exc:
                _log.warning("%s is not read, because it could not be opened: %s", candidate.uri, exc)
                self._dismiss(candidate, exc)
            except Exception as exc:  # noqa: BLE001 - of a plugin; others read on
                _log.warning("%s is not read, because its plugin failed", candidate.uri, exc_info=exc)
                self._dismiss(candidate, exc)
            candidate = self._next_worker()

    @staticmethod
    def _add(reader: PeerReader, source: PeerSource) -> None:
        added = False
        try:
            added = reader.add(source)
        finally:
            if not added:
                source.close()

    def _open_source(self, candidate: Candidate) -> PeerSource | None:
        """Return a connected source; None if its bytes differ from those of the first."""
        source = PeerSource(candidate, self._request, self._context)
        try:
            if self._plan.has_digests_of(source.describe(self._plan)):
                source.connect()
                return source
        except BaseException:
            source.close()
            raise
        source.close()
        _log.info("%s is not read: its tensors have other bytes than those of %s", candidate.uri, self._uri)
        with self._choosing:
            self._in_use.remove(candidate)
            self._unlike.append(candidate)
        return None

    def _lost(self, reads: SourceReads) -> None:
        """Another worker replaces one that failed."""
        assert self._reader is not None  # noqa: S101 - for the type checker: the load reads
        if reads.error is None:
            _log.info("%s is read no further: others have its last ranges sooner", reads.source.uri)
            with self._choosing:
                self._in_use.remove(reads.source.candidate)
                self._slow.append(reads.source.candidate)
            return
        self._dismiss(reads.source.candidate, reads.error)
        self._add_source(self._reader)
        if self._reader.active or self._reader.joining:
            _log.warning("the load goes on without %s, because it failed: %s", reads.source.uri, reads.error)

    def _dismiss(self, candidate: Candidate, error: Exception) -> None:
        """Note that a worker failed. If it was at fault, it is not read over another transport either."""
        with self._choosing:
            self._in_use.remove(candidate)
        if isinstance(error, BackendError) and error.peer_at_fault:
            self._candidates.drop_worker(candidate)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _close_first(self) -> None:
        """Close the first source, unless its reader does."""
        if self._reader is None or not any(each.source is self._first for each in self._reader.sources):
            self._first.close()

    def complete(self) -> LoadReport:
        """Complete the load, and count it."""
        report = super().complete()
        self._count("")
        return report

    def abort(self, exc: BaseException) -> None:
        """Abort the load, and count it. After the failure of a worker, those that did not fail may be tried again."""
        self._count(type(exc).__name__)
        super().abort(exc)
        if self._reader is None or not any(each.error for each in self._reader.sources):
            return  # each load drops at least one candidate
        with self._choosing:
            for candidate in (*self._in_use, *self._slow, *self._unlike):
                self._candidates.put_back(candidate)

    def _count(self, error: str) -> None:
        metrics = source_metrics()
        reader = self._reader
        phases = {}
        if reader is not None:
            phases = {"open": self._opened - self._begun, "read": reader.read_seconds, "verify": reader.verify_seconds}
            if reader.release_seconds:
                phases["release"] = reader.release_seconds
        metrics.loaded(self._selector, error=error, seconds=time.monotonic() - self._begun, phases=phases)
        for reads in reader.sources if reader else ():
            uri = reads.source.candidate.uri
            metrics.read(
                uri.scheme,
                uri.authority,
                read_bytes=reads.arrived_bytes + reads.reread_bytes,
                mismatches=reads.mismatches,
            )

    def _stop(self, exc: BaseException) -> bool:  # noqa: ARG002 - signature of the base class
        if self._reader is not None:
            return self._reader.close()
        if hasattr(self, "_first"):
            self._first.close()
        return True

    def _progress_event(self) -> LoadProgress:
        seconds = time.monotonic() - self._begun
        reader = self._reader
        arrived = 0 if reader is None else reader.arrived_bytes
        planned = self._plan.nbytes
        rate = arrived / seconds if seconds else 0.0
        return LoadProgress(
            load_id=self._id,
            uri=str(self._uri),
            bytes_done=arrived,
            bytes_planned=planned,
            planning_done=self._planning_done,
            seconds=seconds,
            bytes_per_second=rate,
            eta_seconds=(planned - arrived) / rate if rate else None,
            retries=0 if reader is None else reader.read_again,
            sources=0 if reader is None else sum(each.arrived_bytes > 0 for each in reader.sources),
        )

    def _account(self) -> LoadReport:
        assert self._reader is not None  # noqa: S101 - as above
        ended = time.monotonic()
        reader, plan = self._reader, self._plan
        verified = len(plan.chunks) if self._context.settings.verify_digests else 0
        best = max(reader.sources, key=lambda each: each.arrived_bytes)
        return LoadReport(
            uri=best.source.uri,
            storage=best.source.plugin,
            tensors=plan.tensors,
            tensors_in_checkpoint=0,
            files=0,
            bytes_needed=plan.nbytes,
            bytes_fetched=reader.arrived_bytes,
            bytes_reread=reader.reread_bytes,
            bytes_materialised=0,
            header_bytes=0,
            seconds=ended - self._begun,
            phase_seconds={"open": self._opened - self._begun, "load": ended - self._opened},
            goodput_bytes_per_second=plan.nbytes / (ended - self._begun),
            requests=len(plan.chunks) + reader.read_again,
            retries=reader.read_again,
            concurrency=reader.threads,
            verified={"versions": 0, "sizes": 0, "digests": verified},
            materialised_operations={},
            meta_destinations=0,
            peak_rss_bytes=peak_rss_bytes(),
            content_version=self._content_version,
            sources=tuple(map(_report_of, reader.sources)),
        )


def _report_of(reads: SourceReads) -> SourceReport:
    return SourceReport(
        uri=reads.source.uri,
        bytes=reads.arrived_bytes,
        seconds=reads.progressed - reads.begun,
        error=type(reads.error).__name__ if reads.error is not None else "",
        channel=reads.source.channel,
    )
