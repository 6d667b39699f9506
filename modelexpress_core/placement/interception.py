"""What happens to each operation of a thread that loads.

An operation is one of three kinds:

- a view of a deferred tensor (``narrow``, ``view``, ``t``): the operation runs on the meta tensor, and nothing is read;
- a copy of a deferred tensor to a destination: the copy is recorded and fetched in the background;
- any other operation: what it reads or writes is completed first. Deferred tensors among its arguments are read, and
  copies to memory that it touches are completed. Correctness does not depend on knowing the operation.

The operations that loading performs on every weight have shortcuts, with the same results.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from modelexpress_core.errors import PlacementError
from modelexpress_core.placement.deferred import DeferredTensor, Source, deferred_view
from modelexpress_core.placement.materialising import Materialiser, has_plain_bytes
from modelexpress_core.placement.memory import has_memory
from modelexpress_core.placement.modes import SET_DATA, STORAGE_ESCAPES, RecordingMode
from modelexpress_core.placement.operations import Operation, operation
from modelexpress_core.placement.pending_copies import PendingCopies
from modelexpress_core.placement.strides import extent
from modelexpress_core.placement.torch_private import call_composite, is_alias_of

__all__ = ["OperationInterceptor", "fits_bytewise"]

_AS_STRIDED = torch.ops.aten.as_strided.default
_COPY = torch.ops.aten.copy_.default


class OperationInterceptor:
    """Executes the operations of one load. Thread-safe.

    Args:
        pending: The copies of the load.
        materialiser: Reads its deferred tensors.
        lock: Its lock.

    Attributes:
        meta_destinations: Copies onto the meta device, for which nothing is read.
    """

    def __init__(self, pending: PendingCopies, materialiser: Materialiser, lock: threading.RLock) -> None:
        self._pending = pending
        self._materialiser = materialiser
        self._lock = lock
        self.meta_destinations = 0

    # -- deferred tensors ---------------------------------------------------------------------------------------------

    def materialise(self, deferred: DeferredTensor, reason: str) -> torch.Tensor:
        """A plain tensor with the elements of ``deferred``; the report counts ``reason``."""
        return self._materialiser.materialise(deferred, reason)

    def shared_memory(self, deferred: DeferredTensor) -> torch.Tensor:
        """The memory that every view of the stored tensor refers to from now on, because it may be written to."""
        return self._materialiser.shared_memory(deferred)

    def copied(self, deferred: DeferredTensor, destination: torch.Tensor) -> None:
        """Code copied ``deferred`` to ``destination``, bytes to bytes."""
        if deferred.mx_source.prefetched is None:
            self._pending.record(deferred.mx_source, deferred, destination)
        else:
            with self._lock:
                self._copy_bytes(deferred.mx_source, deferred, deferred.nbytes, destination)

    # -- dispatch -----------------------------------------------------------------------------------------------------

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute ``func``, an operation of the thread that records."""
        if func is _COPY and isinstance(args[1], DeferredTensor) and not isinstance(args[0], DeferredTensor):
            with self._lock:
                return self._copy(args, kwargs)
        what = operation(func)
        if what.composite and any(isinstance(value, DeferredTensor) for value in args):
            # Inference mode did not take it apart before dispatch, and on the meta device it may do something else.
            with RecordingMode(self):
                return call_composite(func, args, kwargs)
        if what.view:
            return self._view(func, what, args, kwargs)
        with self._lock:
            return self._compute(func, what, args, kwargs)

    def dispatch_elsewhere(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute ``func`` if no mode sees operations. Later ones cannot wait for its copies, so they are completed."""
        result = self.dispatch(func, args, kwargs)
        with self._lock:
            self._pending.settle_all()
        return result

    def prepare_escape(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments for ``func``, which hands out memory past dispatch: with memory that holds the right bytes."""
        with self._lock:
            if func == SET_DATA:
                return self._prepare_set_data(*args)
            if func in STORAGE_ESCAPES:
                self._pending.settle_all()
            args = tuple(_with_memory(value) for value in args)
            for value in args:
                if isinstance(value, torch.Tensor):
                    self._pending.settle(value)
            return args

    def _prepare_set_data(self, tensor: torch.Tensor, data: Any) -> tuple[Any, ...]:
        if isinstance(tensor, DeferredTensor):
            message = f"{tensor!r} cannot be given other data"
            raise PlacementError(message, tensor=tensor.mx_source.info.name, hint="make a tensor of the data instead")
        if isinstance(data, DeferredTensor):
            data = _with_memory(data)
            self._pending.wrote(tensor)
        return tensor, data

    def _copy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        destination: torch.Tensor = args[0]
        deferred: DeferredTensor = args[1]
        source = deferred.mx_source
        if source.real is None and source.interceptor is self and has_memory(destination):
            shape = destination.shape
            view = deferred if deferred.shape == shape else deferred.mx_meta.expand(shape)
            source.used = True
            if destination.device.type == "meta":
                self.meta_destinations += 1
                return destination
            if fits_bytewise(view, destination):
                self._copy_bytes(source, view, deferred.nbytes, destination)
                return destination
        return self._compute(_COPY, operation(_COPY), args, kwargs)

    def _view(self, func: Any, what: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args else None
        if isinstance(first, DeferredTensor):
            source = first.mx_source
            if what.value_view:
                source.interceptor.shared_memory(first)
            if source.real is None:
                plain = [a.mx_meta if isinstance(a, DeferredTensor) else a for a in args]
                result = func(*plain, **kwargs)
                if func is _AS_STRIDED:
                    _check_bounds(result, source)
                if _all_alias(result, first.mx_meta):
                    return _wrapped(result, source)
            with self._lock:
                return self._compute(func, what, args, kwargs)
        if isinstance(first, torch.Tensor) and not any(isinstance(a, DeferredTensor) for a in args[1:]):
            result = func(*args, **kwargs)
            if not self._pending.exist() or _all_alias(result, first):
                return result
        # The operation copied instead: do it again, after the bytes that it reads arrived.
        with self._lock:
            return self._compute(func, what, args, kwargs)

    def _compute(self, func: Any, what: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if what.shape_only:
            return self._shape_only(func, args, kwargs)
        if what.reshapes_in_place:  # it may move the storage, which other tensors share
            self._pending.settle_all()
        for name in what.written_names & kwargs.keys():  # before the others: they may be views of the same tensor
            self._make_plain(kwargs[name], what, written=True)
        new_args = tuple(self._make_plain(value, what, position in what.written) for position, value in enumerate(args))
        new_kwargs = {key: self._make_plain(value, what, key in what.written_names) for key, value in kwargs.items()}
        result = func(*new_args, **new_kwargs)
        for position in what.written:
            if position < len(new_args):
                self._note_written(args[position], new_args[position], what)
        for name in what.written_names:
            if name in kwargs:
                self._note_written(kwargs[name], new_kwargs[name], what)
        return result

    def _note_written(self, value: Any, plain: Any, what: Operation) -> None:
        if isinstance(value, (list, tuple)):
            for item, plain_item in zip(value, plain, strict=True):
                self._note_written(item, plain_item, what)
        elif isinstance(value, DeferredTensor):
            if value.shape != plain.shape:
                raise _reshaped(what, value)
        elif isinstance(value, torch.Tensor) and not what.reshapes_in_place:
            self._pending.wrote(value)

    def _make_plain(self, value: Any, what: Operation, written: bool) -> Any:
        if isinstance(value, DeferredTensor):
            source = value.mx_source
            if written and what.reshapes_in_place:
                raise _reshaped(what, value)
            if written or what.reshapes_in_place or source.real is not None:
                value = _with_memory(value)
            else:
                plain = source.interceptor.materialise(value, what.name)
                # An operation that may return its own input must not return the tensor that is kept for later reads.
                return plain.clone() if what.view else plain
        if isinstance(value, torch.Tensor):
            self._pending.settle(value)
            return value
        if isinstance(value, (list, tuple)):
            return type(value)([self._make_plain(item, what, written) for item in value])
        return value

    def _shape_only(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(args[0], DeferredTensor):
            return func(*args, **kwargs)
        kwargs = dict(kwargs)
        if kwargs.get("device") is None:
            kwargs["device"] = torch.device("cpu")
        return func(args[0].mx_meta, *args[1:], **kwargs)

    def _copy_bytes(self, source: Source, view: torch.Tensor, needed: int, destination: torch.Tensor) -> None:
        """Copy ``view``: at once if its bytes were fetched ahead, else in the background."""
        source.used = True
        if source.prefetched is None:
            self._pending.record(source, view, destination)
            return
        self._pending.needed_bytes += needed
        self._pending.settle(destination)
        destination.copy_(self._materialiser.prefetched_view(source, view))
        self._pending.wrote(destination)


def _with_memory(value: Any) -> Any:
    """``value``, or its memory if it is deferred."""
    return value.mx_source.interceptor.shared_memory(value) if isinstance(value, DeferredTensor) else value


def fits_bytewise(view: torch.Tensor, destination: torch.Tensor) -> bool:
    """Whether the copy only moves bytes and casts. Otherwise torch does it, or says why it cannot be done."""
    if not has_memory(destination) or not has_plain_bytes(view) or not has_plain_bytes(destination):
        return False
    return not view.is_complex() or destination.is_complex()  # torch warns that it drops the imaginary part


def _check_bounds(view: torch.Tensor, source: Source) -> None:
    """Check what torch checks for tensors with memory, but not for those on the meta device."""
    if not view.numel():
        return
    if (view.storage_offset() + extent(view.shape, view.stride())) * view.itemsize > source.info.length:
        message = (
            f"setStorage: sizes {list(view.shape)}, strides {list(view.stride())}, storage offset "
            f"{view.storage_offset()} and itemsize {view.itemsize} are out of bounds for the "
            f"{source.info.length} bytes of {source.info.name}"
        )
        raise RuntimeError(message)


def _reshaped(what: Operation, deferred: DeferredTensor) -> PlacementError:
    message = f"{what.name} changes the shape of {deferred!r} in place, which a deferred tensor cannot follow"
    name = deferred.mx_source.info.name
    return PlacementError(message, tensor=name, hint="use the operation that returns a new tensor instead")


def _all_alias(result: Any, base: torch.Tensor) -> bool:
    if isinstance(result, torch.Tensor):
        return is_alias_of(result, base)
    return isinstance(result, (list, tuple)) and all(_all_alias(item, base) for item in result)


def _wrapped(result: Any, source: Source) -> Any:
    if isinstance(result, torch.Tensor):
        layout = tuple(result.size()), result.stride(), int(result.storage_offset())
        return deferred_view(source, layout, result.dtype, result)
    return type(result)([_wrapped(item, source) for item in result])
