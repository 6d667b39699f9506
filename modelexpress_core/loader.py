"""The story of a load: find the candidates, open one, plan, fetch, check the account.

1. **Candidates.** ``mx_rewrite_uri`` may replace the URI that was asked for; ``mx_rank_candidates`` says which places
   are tried, best first. The scheme of each picks the storage plugin.
2. **Open.** Headers only, in parallel: which tensor lies where, in which version of which file.
3. **Plan and fetch.** Copies to destinations become reads, which go straight into place while later copies are still
   being recorded.
4. **Check.** Every planned byte arrived, every destination was written; otherwise the load raises.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING

from modelexpress_core.checkpoint import Checkpoint, open_files
from modelexpress_core.errors import (
    BackendError,
    CheckpointError,
    IncompleteLoadError,
    ModelExpressError,
    PlacementError,
    ResolveError,
)
from modelexpress_core.events import LoadFailed, LoadFinished, LoadProgress, LoadStarted
from modelexpress_core.fetch import FetchEngine, RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.plugins import PluginManager
from modelexpress_core.providers import Candidate, LoadRequest
from modelexpress_core.report import LoadReport
from modelexpress_core.settings import LoadSettings, from_env
from modelexpress_core.uri import ModelURI

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modelexpress_core.placement import Recorder

__all__ = ["DeferredWeights", "deferred_weights", "load_into", "load_state_dict", "open_checkpoint"]

_log = logging.getLogger(__name__)

#: Observers hear of progress this often at most.
_PROGRESS_SECONDS = 0.1


@cache
def _default_plugins() -> PluginManager:
    return PluginManager.discover()


class _Context:
    """Settings and plugins of one call."""

    def __init__(self, environ: Mapping[str, str] | None, plugins: PluginManager | None) -> None:
        self.environ = os.environ if environ is None else environ
        self.settings = from_env(LoadSettings, self.environ)
        if plugins is None:
            plugins = _default_plugins() if environ is None else PluginManager.discover(environ)
        self.plugins = plugins

    def candidates(self, uri: str | os.PathLike[str] | ModelURI) -> tuple[Candidate, ...]:
        request = LoadRequest(self.plugins.rewrite_uri(ModelURI.parse(uri)))
        ranked = self.plugins.rank_candidates(request, (Candidate(request.uri),))
        if not ranked:
            message = f"no candidate is left for {request.uri}: a plugin's mx_rank_candidates dropped them all"
            raise ResolveError(message, hint="disable the plugin with MX_DISABLED_PLUGINS")
        return ranked


class _Load:
    """One attempt to load from one candidate: open when it is made, cleaned up when its ``with`` block ends."""

    def __init__(self, candidate: Candidate, context: _Context) -> None:
        self._uri = candidate.uri
        self._plugins = context.plugins
        self._environ = context.environ
        self._settings = context.settings
        self._id = uuid.uuid4().hex
        self._begun = time.monotonic()
        self._opened = self._begun
        self._planning_done = False
        self._reported = self._begun
        self._reporting = threading.Lock()
        self._closing = contextlib.ExitStack()
        self._engine: FetchEngine | None = None
        self.report: LoadReport | None = None
        try:
            self._open()
        except BaseException as exc:
            self._failed(exc)
            raise

    def __enter__(self) -> _Load:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if exc is not None:
            self._failed(exc)
        self._closing.close()

    def _open(self) -> None:
        registered, storage = self._plugins.open_storage(self._uri, self._environ)
        self._closing.callback(storage.close)
        self._registered = registered
        budget = RetryBudget(self._settings.retry_budget_seconds)
        retrying = RetryingStorage(storage, RetryPolicy.from_settings(self._settings), budget)
        self.checkpoint = open_files(retrying, self._uri, provider=registered.provider.name)
        self._opened = time.monotonic()
        self.engine = self._engine = FetchEngine(
            storage,
            self._settings,
            registered.provider.capabilities,
            on_arrival=self._arrived,
            budget=budget,
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

    def _arrived(self) -> None:
        """Called by the fetching threads: tell observers, but seldom, and never two at a time."""
        if time.monotonic() - self._reported < _PROGRESS_SECONDS or not self._reporting.acquire(blocking=False):
            return
        try:
            self._reported = time.monotonic()
            self._plugins.load_progress(self._progress())
        finally:
            self._reporting.release()

    def _progress(self) -> LoadProgress:
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
                "digests": 0,
            },
            materialised_operations=dict(recorder.materialised_operations),
            meta_destinations=recorder.meta_destinations,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def succeed(self, report: LoadReport) -> LoadReport:
        """The load is complete, every check of it included."""
        self.report = report
        self._plugins.load_progress(self._progress())
        self._plugins.load_finished(LoadFinished(load_id=self._id, report=report))
        return report


def _attempts(uri: str | os.PathLike[str] | ModelURI, context: _Context) -> Iterator[tuple[Candidate, bool]]:
    """The candidates, each with whether it is the last."""
    candidates = context.candidates(uri)
    for number, candidate in enumerate(candidates, 1):
        yield candidate, number == len(candidates)


def _give_way(candidate: Candidate, exc: Exception) -> None:
    _log.warning("trying the next place, because loading from %s failed: %s", candidate.uri, exc)


def open_checkpoint(
    uri: str | os.PathLike[str] | ModelURI,
    *,
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
) -> Checkpoint:
    """Files, versions and tensors of the checkpoint at ``uri``. Reads headers only, and needs no torch.

    Args:
        uri: A directory, an index, or one safetensors file, as a URI or a path.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.

    Raises:
        ResolveError: The URI leads nowhere.
        BackendError: The storage failed.
        CheckpointError: What is there is no valid checkpoint.
    """
    context = _Context(environ, plugins)
    for candidate, last in _attempts(uri, context):
        try:
            registered, storage = context.plugins.open_storage(candidate.uri, context.environ)
            with contextlib.closing(storage):
                policy = RetryPolicy.from_settings(context.settings)
                retrying = RetryingStorage(storage, policy, RetryBudget(context.settings.retry_budget_seconds))
                return open_files(retrying, candidate.uri, provider=registered.provider.name)
        except (BackendError, CheckpointError, ResolveError) as exc:
            if last:
                raise
            _give_way(candidate, exc)
    raise AssertionError("a last candidate returns or raises")


def load_state_dict(
    uri: str | os.PathLike[str] | ModelURI,
    *,
    names: Iterable[str] | None = None,
    device: str | torch.device = "cpu",
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint at ``uri``, by name, in memory of their own.

    Args:
        uri: A directory, an index, or one safetensors file, as a URI or a path.
        names: Only these tensors; by default all.
        device: Where the tensors are made.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.

    Returns:
        Tensors in the stored dtype and shape (an F4 tensor packs two values in one element, as torch does).

    Raises:
        ResolveError: The URI leads nowhere.
        BackendError: The storage failed.
        CheckpointError: What is there is no valid checkpoint.
        PlacementError: A name is not in the checkpoint, or torch has no dtype for a tensor.
    """
    import torch

    from modelexpress_core.placement import Recorder
    from modelexpress_core.placement.dtypes import torch_dtype, torch_shape

    context = _Context(environ, plugins)
    wanted = None if names is None else list(names)
    for candidate, last in _attempts(uri, context):
        try:
            with _Load(candidate, context) as load:
                tensors = load.checkpoint.tensors
                recorder = Recorder(load.checkpoint, load.engine)
                state = {}
                for name in tensors if wanted is None else wanted:
                    if name not in tensors:
                        raise PlacementError(
                            f"{load.checkpoint.uri} has no tensor {name!r}",
                            tensor=name,
                            hint="`mx inspect` lists those it has",
                        )
                    info = tensors[name]
                    state[name] = torch.empty(torch_shape(info), dtype=torch_dtype(info), device=device)
                    recorder.place(info, state[name])
                load.succeed(load.finish(recorder))
                return state
        except (BackendError, CheckpointError, ResolveError) as exc:
            if last:
                raise
            _give_way(candidate, exc)
    raise AssertionError("a last candidate returns or raises")


def load_into(
    target: nn.Module | Mapping[str, torch.Tensor],
    uri: str | os.PathLike[str] | ModelURI,
    *,
    strict: bool = True,
    cast: bool = False,
    device: str | torch.device = "cpu",
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
) -> LoadReport:
    """Load the checkpoint at ``uri`` into the tensors of ``target``, in place.

    Every parameter and persistent buffer is written, or this raises. Names, shapes and dtypes are compared before a
    byte is moved. Parameters on the meta device get memory first, and become the module's own at the end.

    Args:
        target: A module, or tensors by name. They may be strided, tied, or on any device.
        uri: A directory, an index, or one safetensors file, as a URI or a path.
        strict: Refuse a checkpoint that holds tensors ``target`` has no place for.
        cast: Convert to the destination's dtype where it differs.
        device: Where tensors on the meta device get memory.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.

    Raises:
        IncompleteLoadError: A destination has no tensor in the checkpoint, or (``strict``) a tensor no destination.
        PlacementError: A shape or (without ``cast``) a dtype differs.
        ResolveError: The URI leads nowhere.
        BackendError: The storage failed; what was written until then is undefined.
        CheckpointError: What is there is no valid checkpoint.
    """
    import torch

    from modelexpress_core.placement import Recorder
    from modelexpress_core.placement.destinations import Destinations

    context = _Context(environ, plugins)
    destinations = Destinations(target, torch.device(device))
    for candidate, last in _attempts(uri, context):
        try:
            with _Load(candidate, context) as load:
                destinations.check(load.checkpoint, strict=strict, cast=cast)
                recorder = Recorder(load.checkpoint, load.engine)
                for name, info in load.checkpoint.tensors.items():
                    if name in destinations.tensors:
                        recorder.place(info, destinations.tensors[name])
                report = load.finish(recorder)
                destinations.adopt()
                return load.succeed(report)
        except (BackendError, CheckpointError, ResolveError) as exc:
            if last:
                raise
            _give_way(candidate, exc)
    raise AssertionError("a last candidate returns or raises")


def deferred_weights(
    uri: str | os.PathLike[str] | ModelURI,
    *,
    model: nn.Module | Mapping[str, torch.Tensor] | None = None,
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
) -> DeferredWeights:
    """The weights at ``uri`` for code that narrows, slices and copies: only what it copies is read, into place.

    Example::

        with mx.deferred_weights("s3://bucket/model", model=model) as weights:
            model.load_weights(weights)
        print(weights.report)

    Within the block, torch operations of this thread are watched, so that code which reads what it has just loaded
    sees real values. The block ends when every byte is in place. Memory that code reached past torch before the block
    (a pointer, a numpy array) is not watched.

    Args:
        uri: A directory, an index, or one safetensors file, as a URI or a path.
        model: Where given, every parameter and persistent buffer of it must be written in the block.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.

    Returns:
        A context manager that yields an iterable of ``(name, tensor)``.
    """
    return DeferredWeights(uri, model=model, environ=environ, plugins=plugins)


class DeferredWeights:
    """An iterable of ``(name, deferred tensor)``, within its ``with`` block. Made by ``deferred_weights``.

    Attributes:
        checkpoint: The checkpoint, once the block was entered.
        report: What was done, once the block has ended well; None before.
    """

    checkpoint: Checkpoint

    def __init__(
        self,
        uri: str | os.PathLike[str] | ModelURI,
        *,
        model: nn.Module | Mapping[str, torch.Tensor] | None,
        environ: Mapping[str, str] | None,
        plugins: PluginManager | None,
    ) -> None:
        self._uri = uri
        self._model = model
        self._context = _Context(environ, plugins)
        self._recorder: Recorder | None = None
        self._block = self._run()
        self.report: LoadReport | None = None

    def __enter__(self) -> DeferredWeights:
        if self._recorder is not None:
            message = "these deferred weights were used already"
            raise PlacementError(message, hint="call deferred_weights again for each load")
        self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        return self._block.__exit__(kind, exc, tb)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._recorder is None:
            message = "deferred weights are iterated outside their with block"
            raise PlacementError(message, hint="write: with deferred_weights(uri) as weights: ...")
        return self._recorder.deferred()

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)

    @contextlib.contextmanager
    def _run(self) -> Iterator[None]:
        from modelexpress_core.placement import Recorder
        from modelexpress_core.placement.coverage import Coverage

        coverage = None if self._model is None else Coverage(_named_tensors(self._model))
        with self._open() as load:
            self.checkpoint = load.checkpoint
            self._recorder = recorder = Recorder(load.checkpoint, load.engine, coverage)
            try:
                with recorder:
                    yield
                report = load.finish(recorder)
            finally:
                recorder.end()
            self._check(report, () if coverage is None else coverage.missing())
            self.report = load.succeed(report)

    def _open(self) -> _Load:
        for candidate, last in _attempts(self._uri, self._context):
            try:
                return _Load(candidate, self._context)
            except (BackendError, CheckpointError, ResolveError) as exc:
                if last:
                    raise
                _give_way(candidate, exc)
        raise AssertionError("a last candidate returns or raises")

    def _check(self, report: LoadReport, missing: Sequence[str]) -> None:
        if missing:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise IncompleteLoadError(
                f"{len(missing)} tensors of the model were not wholly written: {shown}",
                missing=missing,
                cause="the checkpoint is of another model, or the code that loads skips what it does not know",
                hint="compare the names with `mx inspect`",
            )
        if not report.tensors and len(self.checkpoint.tensors):
            raise IncompleteLoadError(
                f"nothing of {self.checkpoint.uri} was used",
                cause="the code that loads knows none of its names",
                hint="compare the names with `mx inspect`",
            )


def _named_tensors(model: nn.Module | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    import torch

    if isinstance(model, Mapping):
        return model
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}
