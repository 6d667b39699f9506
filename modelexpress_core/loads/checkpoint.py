"""A load from the files of a checkpoint: any rank of any layout reads only the bytes it needs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

from attrs import frozen

from modelexpress_core.checkpoint import Checkpoint
from modelexpress_core.contracts.candidates import Candidate
from modelexpress_core.contracts.storage import Compared, ComparingStorage, Storage
from modelexpress_core.events import LoadProgress
from modelexpress_core.fetch import FetchEngine, RetryBudget, concurrency_for
from modelexpress_core.loads.context import LoadContext, redacted_uris
from modelexpress_core.loads.destination import Destination
from modelexpress_core.loads.load import Load, peak_rss_bytes
from modelexpress_core.plugins import STORAGE
from modelexpress_core.report import LoadReport
from modelexpress_core.resources import allocating

if TYPE_CHECKING:
    from modelexpress_core.placement import Recorder

__all__ = ["CheckpointLoad", "Headers"]


@frozen
class Headers:
    """The headers of a checkpoint that were read to tell its content version.

    Attributes:
        checkpoint: What they say; each file is pinned to its version of that moment.
        answer_seconds: How long the fastest read of them took; None if there was none.
    """

    checkpoint: Checkpoint
    answer_seconds: float | None


class CheckpointLoad(Load):
    """Copies to the destination become reads of the files, which go straight into place.

    Args:
        candidate: The checkpoint.
        context: Settings and plugins.
        destination: The destination.
        headers: Its headers, if they were read already. They are read again where a load compares digests for which
            the storage is asked file by file.

    Attributes:
        checkpoint: The checkpoint, once the load is open.
        recorder: Records the copies, once the load is open.
    """

    checkpoint: Checkpoint
    recorder: Recorder

    def __init__(
        self, candidate: Candidate, context: LoadContext, destination: Destination, headers: Headers | None = None
    ) -> None:
        super().__init__(candidate, context, destination)
        self._headers = headers
        self._engine: FetchEngine | None = None

    def open(self) -> None:
        """Read the headers of all files, in parallel: position of each tensor, and version of each file."""
        self._registered, storage = self._plugins.open(STORAGE, self._uri, self._context.environ)
        self._closing.callback(storage.close)
        self._storage = storage
        budget = self._context.new_budget()
        provider, settings = self._registered.provider, self._context.settings
        headers = self._headers
        if headers is None or self._context.asks_digests(provider):
            headers = self._read_headers(storage, budget)
        self.checkpoint = headers.checkpoint
        self.engine = self._engine = FetchEngine(
            storage,
            settings,
            provider.capabilities,
            on_arrival=self._progress.arrived,
            budget=budget,
            limit=concurrency_for(provider.capabilities, settings, answer_seconds=headers.answer_seconds),
            uri_of=redacted_uris(self._uri),
        )
        self._announce(
            provider=provider.name,
            files=len(self.checkpoint.files),
            tensors=len(self.checkpoint.tensors),
            size_bytes=self.checkpoint.tensor_bytes,
        )
        self.destination.check_checkpoint(self.checkpoint)
        self.recorder = self.destination.new_recorder(self.checkpoint, self.engine)

    def _read_headers(self, storage: Storage, budget: RetryBudget) -> Headers:
        seconds: list[float] = []
        checkpoint = self._context.read_headers(
            self._uri,
            self._registered,
            storage,
            budget,
            to_load=True,
            on_read=lambda taken, _whole: seconds.append(taken),
        )
        return Headers(checkpoint, min(seconds, default=None))

    def fetch(self) -> None:
        """Record the copies, and read while later ones are still being recorded."""
        self.destination.touch()
        with allocating(f"the load of {self._uri}"):
            self.destination.copy_from(self.checkpoint, self.recorder)
            self._planning_done = True
            self.recorder.finish()

    def _stop(self, exc: BaseException) -> bool:
        if self._engine is None:
            self._closing.close()
            return True
        return self._engine.abort(exc)

    def _progress_event(self) -> LoadProgress:
        ledger = self.engine.ledger
        rate = ledger.rate()
        left = ledger.planned_bytes - ledger.arrived_bytes
        return LoadProgress(
            load_id=self._id,
            uri=str(self._uri),
            bytes_done=ledger.arrived_bytes,
            bytes_planned=ledger.planned_bytes,
            planning_done=self._planning_done,
            seconds=time.monotonic() - self._begun,
            bytes_per_second=rate,
            eta_seconds=left / rate if rate and self._planning_done else None,
            retries=ledger.retries,
            limiter=self.engine.usage.limiter(),
        )

    def _account(self) -> LoadReport:
        ended = time.monotonic()
        recorder, ledger = self.recorder, self.engine.ledger
        files = self.checkpoint.files
        capabilities = self._registered.provider.capabilities
        global_versions = capabilities.global_versions
        compared = cast("ComparingStorage", self._storage).compared() if capabilities.compares else Compared()
        return LoadReport(
            uri=str(self._uri),
            storage={"plugin": self._registered.plugin.name, "version": self._registered.plugin.version},
            tensors=recorder.tensors_used,
            tensors_in_checkpoint=len(self.checkpoint.tensors),
            files=recorder.files_used,
            bytes_needed=recorder.needed_bytes,
            bytes_fetched=ledger.arrived_bytes,
            bytes_reread=ledger.reread_bytes,
            bytes_materialised=recorder.materialised_bytes,
            header_bytes=self.checkpoint.opened_bytes,
            seconds=ended - self._begun,
            phase_seconds={"open": self._opened - self._begun, "load": ended - self._opened},
            goodput_bytes_per_second=recorder.needed_bytes / (ended - self._begun),
            requests=ledger.requests,
            retries=ledger.retries,
            concurrency=ledger.most_in_flight,
            verified={
                "versions": sum(file.version is not None for file in files),
                "sizes": len(files),
                "digests": ledger.verified_files,
            },
            materialised_operations=dict(recorder.materialised_operations),
            meta_destinations=recorder.meta_destinations,
            peak_rss_bytes=peak_rss_bytes(),
            content_version=(global_versions and self.checkpoint.content_version) or "",
            bytes_compared=compared.here_bytes,
            bytes_compared_by_server=compared.by_server_bytes,
            channel=compared.channel,
        )
