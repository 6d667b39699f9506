"""The story of a load: find the candidates, open one, plan, fetch, check the account.

1. **Candidates.** ``mx_rewrite_uri`` may replace the URI that was asked for; discoveries name workers that hold what
   this one needs, where it says what that is; ``mx_rank_candidates`` says which places are tried, best first. The
   scheme of each picks the plugin.
2. **Open.** Headers only, in parallel: which tensor lies where, in which version of which file.
3. **Plan and fetch.** Copies to destinations become reads, which go straight into place while later copies are still
   being recorded.
4. **Check.** Every planned byte arrived, files that were read as a whole have the digests that their storage publishes,
   every destination was written; otherwise the load raises.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import time
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from modelexpress_core.checkpoint import Checkpoint, open_files
from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.contracts.storage import Storage
from modelexpress_core.errors import BackendError, CheckpointError, ModelExpressError, ResolveError
from modelexpress_core.events import LoadFailed, LoadFinished, LoadProgress, LoadStarted
from modelexpress_core.fetch import FetchEngine, ProgressReporter, RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.providers import StorageProvider
from modelexpress_core.registry import Registered
from modelexpress_core.report import LoadReport
from modelexpress_core.settings import LoadSettings, from_env
from modelexpress_core.sources.discovery import find_candidates
from modelexpress_core.uri import ModelURI

if TYPE_CHECKING:
    from modelexpress_core.contracts.identity import SourceIdentity
    from modelexpress_core.placement import Recorder

__all__ = ["Load", "Loader", "redacted_uris"]

_log = logging.getLogger(__name__)
_R = TypeVar("_R")


def redacted_uris(uri: ModelURI) -> Callable[[str], str]:
    """What makes the redacted URI of an object in the storage of ``uri``, of its path."""
    return lambda path: str(uri.with_path(path))


@cache
def _default_plugins() -> PluginManager:
    return PluginManager.discover()


class Loader:
    """Settings and plugins of one call: finds the places to load from, and tries them.

    Args:
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.
    """

    def __init__(self, environ: Mapping[str, str] | None, plugins: PluginManager | None) -> None:
        self.environ = os.environ if environ is None else environ
        self.settings = from_env(LoadSettings, self.environ)
        if plugins is None:
            plugins = _default_plugins() if environ is None else PluginManager.discover(environ)
        self.plugins = plugins

    def first(self, uri: str | os.PathLike[str] | ModelURI, attempt: Callable[[Candidate], _R]) -> _R:
        """What ``attempt`` returns for the first candidate with which it succeeds; the last one's error otherwise."""
        *others, last = self.candidates(uri)
        for candidate in others:
            try:
                return attempt(candidate)
            except (BackendError, CheckpointError, ResolveError) as exc:
                _log.warning("trying the next place, because loading from %s failed: %s", candidate.uri, exc)
        return attempt(last)

    def candidates(
        self,
        uri: str | os.PathLike[str] | ModelURI,
        *,
        identity: SourceIdentity | None = None,
        worker_rank: int = 0,
        reader: str = "",
    ) -> tuple[Candidate, ...]:
        """The places to try, best first.

        Args:
            uri: The checkpoint.
            identity: The model as it will be in memory, for discoveries to find workers that hold it; without one, none
                is asked.
            worker_rank: Which part of it is needed.
            reader: Who asks, as ``LoadRequest`` has it.

        Raises:
            InvalidURIError: ``uri`` is not one.
            ResolveError: A plugin dropped them all.
            SettingsError: A variable that says which discoveries are asked makes no sense.
        """
        request = LoadRequest(self.plugins.rewrite_uri(ModelURI.parse(uri)), identity, worker_rank, reader)
        ranked = find_candidates(self.plugins, self.environ, request)
        if not ranked:
            message = f"no candidate is left for {request.uri}: a plugin's mx_rank_candidates dropped them all"
            raise ResolveError(message, hint="disable the plugin with MX_DISABLED_PLUGINS")
        return ranked

    def open(self, candidate: Candidate) -> Load:
        """Begin a load from ``candidate``: its checkpoint is open when this returns."""
        return Load(candidate, self)

    def open_headers(self, candidate: Candidate) -> Checkpoint:
        """The checkpoint of ``candidate``, for whoever wants no more than that."""
        registered, storage = self.plugins.open(STORAGE, candidate.uri, self.environ)
        with contextlib.closing(storage):
            return self.read_headers(candidate.uri, registered, storage, self.new_budget())

    def new_budget(self) -> RetryBudget:
        """The waiting time of one load."""
        return RetryBudget(self.settings.retry_budget_seconds)

    def read_headers(
        self,
        uri: ModelURI,
        registered: Registered[StorageProvider],
        storage: Storage,
        budget: RetryBudget,
        *,
        to_load: bool = False,
    ) -> Checkpoint:
        """The checkpoint at ``uri`` in a storage that is open, with the retries that the user set.

        Where it is opened ``to_load``, its files come with the digests that they are compared with.
        """
        policy = RetryPolicy.from_settings(self.settings)
        retrying = RetryingStorage(storage, policy, budget, uri_of=redacted_uris(uri))
        provider = registered.provider
        ask_digests = to_load and self.settings.verify_digests and provider.capabilities.stat_digests
        return open_files(retrying, uri, provider=provider.name, ask_digests=ask_digests)


class Load:
    """One attempt to load from one candidate: open when it is made, cleaned up when its ``with`` block ends."""

    def __init__(self, candidate: Candidate, loader: Loader) -> None:
        self._uri = candidate.uri
        self._loader = loader
        self._plugins = loader.plugins
        self._id = uuid.uuid4().hex
        self._begun = time.monotonic()
        self._opened = self._begun
        self._planning_done = False
        self._progress = ProgressReporter(lambda: self._plugins.load_progress(self._progress_event()))
        self._closing = contextlib.ExitStack()
        self._engine: FetchEngine | None = None
        try:
            self._open()
        except BaseException as exc:
            self._failed(exc)
            raise

    def __enter__(self) -> Load:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if exc is not None:
            self._failed(exc)
        self._closing.close()

    def _open(self) -> None:
        registered, storage = self._plugins.open(STORAGE, self._uri, self._loader.environ)
        self._closing.callback(storage.close)
        self._registered = registered
        budget = self._loader.new_budget()
        self.checkpoint = self._loader.read_headers(self._uri, registered, storage, budget, to_load=True)
        self._opened = time.monotonic()
        self.engine = self._engine = FetchEngine(
            storage,
            self._loader.settings,
            registered.provider.capabilities,
            on_arrival=self._progress.arrived,
            budget=budget,
            uri_of=redacted_uris(self._uri),
        )
        self._plugins.load_started(
            LoadStarted(
                load_id=self._id,
                uri=str(self._uri),
                provider=registered.provider.name,
                files=len(self.checkpoint.files),
                tensors=len(self.checkpoint.tensors),
                checkpoint_bytes=self.checkpoint.tensor_bytes,
            )
        )

    def _failed(self, exc: BaseException) -> None:
        stopped = True
        if self._engine is None:
            self._closing.close()
        else:
            stopped = self._engine.abort(exc)
        seconds = time.monotonic() - self._begun
        self._plugins.load_failed(LoadFailed(load_id=self._id, uri=str(self._uri), error=exc, seconds=seconds))
        if not stopped:  # no error that another candidate could make good: somebody still writes to the destination
            message = f"reads of {self._uri} go on after the load has failed, so its destination must not be used"
            raise ModelExpressError(message, hint="end this process") from exc

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

    def finish(self, recorder: Recorder) -> LoadReport:
        """Wait until everything is in place, and say what it took."""
        self._planning_done = True
        recorder.finish()
        ended = time.monotonic()
        ledger = self.engine.ledger
        files = self.checkpoint.files
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
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def succeed(self, report: LoadReport) -> LoadReport:
        """The load is complete, every check of it included."""
        self._progress.report_now()
        self._plugins.load_finished(LoadFinished(load_id=self._id, report=report))
        return report
