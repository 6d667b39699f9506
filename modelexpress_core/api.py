"""The functions that users call. What they do, step by step, is in ``modelexpress_core.loader``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from modelexpress_core.checkpoint import Checkpoint
from modelexpress_core.contracts.candidates import Candidate
from modelexpress_core.errors import IncompleteLoadError, PlacementError
from modelexpress_core.loader import Loader
from modelexpress_core.messages import listed
from modelexpress_core.plugins import PluginManager
from modelexpress_core.report import LoadReport
from modelexpress_core.uri import ModelURI

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modelexpress_core.placement import Recorder

__all__ = ["DeferredWeights", "deferred_weights", "load_into", "load_state_dict", "open_checkpoint"]


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
    loader = Loader(environ, plugins)
    return loader.first(uri, loader.open_headers)


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
        names: Only these tensors (a single name will do); by default all.
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

    loader = Loader(environ, plugins)
    if isinstance(names, str):
        names = [names]
    wanted = None if names is None else list(names)

    def attempt(candidate: Candidate) -> dict[str, torch.Tensor]:
        with loader.open(candidate) as load:
            tensors = load.checkpoint.tensors
            recorder = Recorder(load.checkpoint, load.engine, fresh=True)
            state = {}
            for name in tensors if wanted is None else wanted:
                if name not in tensors:
                    message = f"{load.checkpoint.uri} has no tensor {name!r}"
                    raise PlacementError(message, tensor=name, hint="`mx inspect` lists those it has")
                info = tensors[name]
                state[name] = torch.empty(torch_shape(info), dtype=torch_dtype(info), device=device)
                recorder.copy_whole(info, state[name])
            load.succeed(load.finish(recorder))
            return state

    return loader.first(uri, attempt)


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

    loader = Loader(environ, plugins)
    destinations = Destinations(target, torch.device(device))

    def attempt(candidate: Candidate) -> LoadReport:
        with loader.open(candidate) as load:
            destinations.check(load.checkpoint, strict=strict, cast=cast)
            recorder = Recorder(load.checkpoint, load.engine)
            for name, info in load.checkpoint.tensors.items():
                if name in destinations.tensors:
                    recorder.copy_whole(info, destinations.tensors[name])
            report = load.finish(recorder)
            destinations.adopt()
            return load.succeed(report)

    return loader.first(uri, attempt)


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
        self._loader = Loader(environ, plugins)
        self._recorder: Recorder | None = None
        self._entered = False
        self._block = self._run()
        self.report: LoadReport | None = None

    def __enter__(self) -> DeferredWeights:
        if self._entered:
            message = "these deferred weights were used already"
            raise PlacementError(message, hint="call deferred_weights again for each load")
        self._entered = True
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
        return 0 if self._recorder is None else len(self.checkpoint.tensors)

    @contextlib.contextmanager
    def _run(self) -> Iterator[None]:
        from modelexpress_core.placement import Recorder
        from modelexpress_core.placement.coverage import Coverage

        coverage = None if self._model is None else Coverage(_named_tensors(self._model))
        with self._loader.first(self._uri, self._loader.open) as load:
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

    def _check(self, report: LoadReport, missing: Sequence[str]) -> None:
        if missing:
            raise IncompleteLoadError(
                f"{len(missing)} tensors of the model were not wholly written: {listed(missing)}",
                missing=missing,
                cause="the checkpoint is of another model, the code that loads skips what it does not know, or the "
                "model is on the meta device, which has no memory",
                hint="compare the names with `mx inspect`; give a model on the meta device memory with to_empty",
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
