"""The steps and events that loads from checkpoints and from peers share."""

from __future__ import annotations

import contextlib
import logging
import resource
import time
import uuid
from abc import ABC, abstractmethod
from types import TracebackType
from typing import TYPE_CHECKING

from modelexpress_core.contracts.candidates import Candidate
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.events import LoadFailed, LoadFinished, LoadProgress, LoadStarted
from modelexpress_core.fetch import ProgressReporter
from modelexpress_core.loads.context import LoadContext
from modelexpress_core.loads.destination import Destination
from modelexpress_core.report import LoadReport

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Load", "peak_rss_bytes"]

_log = logging.getLogger(__name__)


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Load(ABC):
    """One attempt to load from one candidate: ``open``, ``fetch``, ``complete``, or ``abort`` after any of them.

    As a context manager it aborts on an error, and always closes its connections.

    Args:
        candidate: The source.
        context: Settings and plugins.
        destination: The destination, which becomes touched before the first byte is written.
    """

    def __init__(self, candidate: Candidate, context: LoadContext, destination: Destination) -> None:
        self._uri = candidate.uri
        self._context = context
        self._plugins = context.plugins
        self.destination = destination
        self._id = uuid.uuid4().hex
        self._begun = time.monotonic()
        self._opened = self._begun
        self._planning_done = False
        self._progress = ProgressReporter(lambda: self._plugins.load_progress(self._progress_event()))
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if exc is None:
            self._closing.close()
            return
        try:
            self.abort(exc)
        finally:
            with contextlib.suppress(ModelExpressError):  # must not replace the error that forbids a next candidate
                self._closing.close()

    # -- the steps ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def open(self) -> None:
        """Read what the source holds, and compare it with the destination. No weight byte moves.

        Raises:
            BackendError: The source cannot be read.
            CheckpointError: The files there are no valid checkpoint.
            PlacementError, IncompleteLoadError: The source does not fit the destination.
        """

    @abstractmethod
    def fetch(self) -> None:
        """Touch the destination, and move every byte into place.

        Raises:
            BackendError: Bytes did not arrive, or are wrong.
        """

    def complete(self) -> LoadReport:
        """Check that everything was written, hand the result to the owner, and report.

        Raises:
            IncompleteLoadError: Something was not written.
        """
        report = self._account()
        self.destination.complete(report)
        self._progress.report_now()
        seconds = time.monotonic() - self._begun
        _log.debug(
            "loaded %s in %.2f s: %d bytes in %d reads", self._uri, seconds, report.bytes_fetched, report.requests
        )
        self._plugins.load_finished(LoadFinished(load_id=self._id, report=report))
        return report

    def abort(self, exc: BaseException) -> None:
        """End a load that failed with ``exc``.

        Raises:
            ModelExpressError: Reads may still write to the destination, so that no other candidate may follow.
        """
        stopped = self._stop(exc)
        seconds = time.monotonic() - self._begun
        self._plugins.load_failed(LoadFailed(load_id=self._id, uri=str(self._uri), error=exc, seconds=seconds))
        if not stopped:
            message = f"reads of {self._uri} continue after the load has failed, so its destination must not be used"
            raise ModelExpressError(message, hint="end this process") from exc

    def probe(self) -> None:
        """Open, and close again: no byte moves, and a lease is released at once.

        Raises:
            ModelExpressError: As ``open`` does, or the worker does not confirm the lease.
        """
        with self._closing:
            self.open()

    # -- what subclasses implement ------------------------------------------------------------------------------------

    @abstractmethod
    def _account(self) -> LoadReport:
        """Return the report of this load."""

    @abstractmethod
    def _stop(self, exc: BaseException) -> bool:
        """Stop reading; return whether nothing can write to the destination any more."""

    @abstractmethod
    def _progress_event(self) -> LoadProgress:
        """Return the progress of this load."""

    def _announce(self, *, provider: str, files: int, tensors: int, size_bytes: int) -> None:
        """Notify observers that the load is open."""
        self._opened = time.monotonic()
        seconds = self._opened - self._begun
        _log.debug("opened %s with %s in %.2f s: %d tensors in %d files", self._uri, provider, seconds, tensors, files)
        self._plugins.load_started(
            LoadStarted(
                load_id=self._id,
                uri=str(self._uri),
                provider=provider,
                files=files,
                tensors=tensors,
                checkpoint_bytes=size_bytes,
            )
        )
