"""The functions that users call. ``modelexpress_core.loader`` describes their steps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from modelexpress_core.checkpoint import Checkpoint
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.errors import PlacementError
from modelexpress_core.loader import Loader
from modelexpress_core.loads.checkpoint import CheckpointLoad
from modelexpress_core.plugins import PluginManager
from modelexpress_core.report import LoadReport
from modelexpress_core.uri import ModelURI

if TYPE_CHECKING:
    import torch
    from torch import nn

    from modelexpress_core.sources.offering import Offer

__all__ = ["DeferredWeights", "deferred_weights", "load_into", "load_state_dict", "open_checkpoint", "publish"]


def open_checkpoint(
    uri: str | os.PathLike[str] | ModelURI,
    *,
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
) -> Checkpoint:
    """Return files, versions and tensors of the checkpoint at ``uri``. Reads headers only, and needs no torch.

    Args:
        uri: A directory, an index, or one safetensors file, as a URI or a path.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.

    Raises:
        ResolveError: The URI is not valid, or no plugin handles it.
        BackendError: The storage failed.
        CheckpointError: The files there are no valid checkpoint.
    """
    loader = Loader(environ, plugins)
    return loader.first(loader.request(uri), loader.open_headers)


def load_state_dict(
    uri: str | os.PathLike[str] | ModelURI,
    *,
    names: Iterable[str] | None = None,
    device: str | torch.device = "cpu",
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
) -> dict[str, torch.Tensor]:
    """Return the tensors of the checkpoint at ``uri``, by name, in new memory.

    Args:
        uri: A directory, an index, or one safetensors file, as a URI or a path.
        names: Only these tensors (a string selects one); by default all.
        device: Device for the tensors.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.

    Returns:
        Tensors in the stored dtype and shape (an F4 tensor packs two values in one element, as torch does).

    Raises:
        ResolveError: The URI is not valid, or no plugin handles it.
        BackendError: The storage failed.
        CheckpointError: The files there are no valid checkpoint.
        PlacementError: A name is not in the checkpoint, torch has no dtype for a tensor, or cannot use the device.
        ResourceError: There is too little memory, or no thread can be started.
    """
    from modelexpress_core.loads.targets import NewTensors

    if isinstance(names, str):
        names = [names]
    loader = Loader(environ, plugins)
    target = NewTensors(None if names is None else list(names), device)
    loader.load(loader.request(uri), target)
    return target.tensors


def load_into(
    target: nn.Module | Mapping[str, torch.Tensor],
    uri: str | os.PathLike[str] | ModelURI,
    *,
    identity: SourceIdentity | None = None,
    worker_rank: int = 0,
    strict: bool = True,
    cast: bool = False,
    device: str | torch.device = "cpu",
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
) -> LoadReport:
    """Load the checkpoint at ``uri`` into the tensors of ``target``, in place.

    Every parameter and persistent buffer is written, or this raises. Names, shapes and dtypes are compared before a
    byte moves. Parameters on the meta device get memory, and replace those of the module at the end.

    With an ``identity``, workers that hold the model in memory are tried first (see ``publish``); then the checkpoint.

    Args:
        target: A module, or tensors by name. They may be strided, tied, or on any device.
        uri: A directory, an index, or one safetensors file, as a URI or a path; or a worker:
            ``grpc://host:6555/<source id>/<worker id>``.
        identity: The model as it will be in the memory of ``target``; see ``own_identity``. Workers that published an
            equal one hold the same bytes. None reads from no worker but one that ``uri`` names.
        worker_rank: Rank of the part of the model that ``target`` is.
        strict: Refuse a checkpoint with tensors that ``target`` does not have.
        cast: Convert to the destination's dtype if it differs.
        device: Device on which tensors on the meta device get memory.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.

    Raises:
        IncompleteLoadError: A destination has no tensor in the checkpoint, or (``strict``) a tensor has no destination.
        PlacementError: A shape or (without ``cast``) a dtype differs, or torch cannot use the device.
        ResourceError: There is too little memory, or no thread can be started.
        ResolveError: The URI is not valid, or no plugin handles it.
        BackendError: The storage failed; the contents of ``target`` are then undefined.
        CheckpointError: The files there are no valid checkpoint.
    """
    from modelexpress_core.loads.targets import Target
    from modelexpress_core.placement.destinations import Destinations
    from modelexpress_core.placement.devices import device_with_memory

    loader = Loader(environ, plugins)
    tensors = Destinations(target, device_with_memory(device))
    request = loader.request(uri, identity=identity, worker_rank=worker_rank)
    return loader.load(request, Target(tensors, strict=strict, cast=cast))


@contextlib.contextmanager
def publish(
    target: nn.Module | Mapping[str, torch.Tensor],
    *,
    identity: SourceIdentity,
    worker_rank: int = 0,
    device: int = 0,
    transports: Sequence[str] | None = None,
    load: Callable[[], float | None] | None = None,
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
) -> Iterator[Offer]:
    """Offer the tensors of ``target`` to other workers during the ``with`` block; they must not change in it.

    The worker publishes itself to the server that MODEL_EXPRESS_URL names. At the end of the block it withdraws, and
    waits for its readers for up to MX_WORKER_DRAIN_SECONDS.

    Args:
        target: A module (its parameters and persistent buffers), or tensors by name, on their final device.
        identity: The model as it is in memory; see ``own_identity``.
        worker_rank: Rank of the part of the model that ``target`` is.
        device: Number of the device, added to MX_WORKER_GRPC_PORT.
        transports: Schemes of the transports over which the tensors can be read; by default those of all installed
            plugins.
        load: Called for each heartbeat; returns how busy the worker is, from 0 to 1, or None if unknown.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.

    Raises:
        SettingsError: Variables, or files that they name, cannot be used.
        PlacementError: A tensor has no memory, or the identity has no content version.
        ResolveError: No plugin handles one of ``transports``.
        ModelExpressError: The port is in use.
    """
    from modelexpress_core.sources.offering import Offer

    if not identity.content_version:
        message = "the identity does not say which content the tensors have, so that others could read wrong weights"
        hint = "pass content_version=report.content_version of their load to own_identity, or a text of your own"
        raise PlacementError(message, hint=hint)
    with Offer(
        identity,
        _named_tensors(target),
        worker_rank=worker_rank,
        device=device,
        transports=transports,
        load=load,
        environ=environ,
        plugins=plugins,
    ) as offer:
        offer.ready()
        yield offer


def _named_tensors(target: nn.Module | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    import torch

    state = target if isinstance(target, Mapping) else target.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}


def deferred_weights(
    uri: str | os.PathLike[str] | ModelURI,
    *,
    model: nn.Module | Mapping[str, torch.Tensor] | None = None,
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
) -> DeferredWeights:
    """Return the weights at ``uri`` as deferred tensors: code slices and copies them, and only copied bytes are read.

    Example::

        with mx.deferred_weights("s3://bucket/model", model=model) as weights:
            model.load_weights(weights)
        print(weights.report)

    Bytes go straight into the memory that they are copied to. Within the block, torch operations of this thread are
    intercepted, so that code which reads a tensor that it has just loaded sees real values. The block ends when every
    byte is in place. Access that bypasses torch, through a pointer or a numpy array from before the block, is not
    intercepted.

    Args:
        uri: A directory, an index, or one safetensors file, as a URI or a path.
        model: If given, each of its parameters and persistent buffers must be written in the block.
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
        report: The report, once the block has ended without an error; None before.
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
        self._load: CheckpointLoad | None = None
        self._entered = False
        self._block = self._run()
        self.report: LoadReport | None = None

    def __enter__(self) -> DeferredWeights:
        if self._entered:
            message = "these deferred weights have already been used"
            raise PlacementError(message, hint="call deferred_weights again for each load")
        self._entered = True
        self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        return self._block.__exit__(kind, exc, tb)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._load is None:
            message = "deferred weights are iterated outside their with block"
            raise PlacementError(message, hint="write: with deferred_weights(uri) as weights: ...")
        self._load.destination.touch()
        return self._load.recorder.deferred()

    def __len__(self) -> int:
        return 0 if self._load is None else len(self.checkpoint.tensors)

    @contextlib.contextmanager
    def _run(self) -> Iterator[None]:
        from modelexpress_core.loads.targets import DeferredTarget

        request = self._loader.request(self._uri)
        with self._loader.open_checkpoint(request, DeferredTarget(self._model)) as load:
            self.checkpoint = load.checkpoint
            self._load = load
            try:
                with load.recorder:
                    yield
                load.fetch()
            finally:
                load.recorder.end()
            self.report = load.complete()
