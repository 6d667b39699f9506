"""The operations that loading performs on every weight, done without torch's dispatch: it takes much longer.

An expert of a mixture-of-experts checkpoint costs five operations: three views of the parameter, one of the weight, a
copy. These are their plain forms, with the results of ``OperationInterceptor.dispatch``. In all other cases, and in
every doubtful one, a shortcut does nothing and returns NotImplemented, and the operation goes through dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from modelexpress_core.placement.deferred import DeferredTensor, Interceptor, deferred_view
from modelexpress_core.placement.memory import PLAIN_CLASSES, is_ordinary
from modelexpress_core.placement.torch_private import PYTHON_KEY, PYTHON_SNAPSHOT_KEY, exclude_dispatch_key
from modelexpress_core.placement.views import LAYOUTS, LayoutOf, is_plain_index

__all__ = ["SHORTCUTS", "Shortcut"]

#: Takes the interceptor whose mode is the only one, and the arguments of a torch function.
Shortcut = Callable[[Interceptor, tuple[Any, ...]], Any]

_grad_enabled = torch.is_grad_enabled
_in_inference_mode = torch.is_inference_mode_enabled
_increment_version = torch.autograd.graph.increment_version
_STRIDED = torch.strided
_GET_ITEM: Any = torch.Tensor.__getitem__


def _view(func: Any, layout_of: LayoutOf) -> Shortcut:
    """The shortcut for ``func``, which returns a view of its first argument."""

    def view(_: Interceptor, args: tuple[Any, ...]) -> Any:
        tensor = args[0]
        kind = type(tensor)
        if kind is DeferredTensor:
            source = tensor.mx_source
            if source.real is not None or tensor.requires_grad or tensor.is_inference() is not _in_inference_mode():
                return NotImplemented
            layout = layout_of(tensor.mx_layout, args)
            return NotImplemented if layout is None else deferred_view(source, layout, tensor.dtype)
        if kind not in PLAIN_CLASSES or tensor.layout is not _STRIDED or tensor.is_nested:
            return NotImplemented
        for value in args[1:]:
            if type(value) is not int and not (func is _GET_ITEM and is_plain_index(value)):
                return NotImplemented
        # A view of plain memory has no effect on recording.
        try:
            exclude_dispatch_key(PYTHON_KEY, True)
            exclude_dispatch_key(PYTHON_SNAPSHOT_KEY, True)
            return func(*args)
        finally:
            exclude_dispatch_key(PYTHON_KEY, False)
            exclude_dispatch_key(PYTHON_SNAPSHOT_KEY, False)

    return view


def _copy(interceptor: Interceptor, args: tuple[Any, ...]) -> Any:
    """``destination.copy_(deferred)``."""
    if len(args) != 2 or type(args[1]) is not DeferredTensor or not is_ordinary(args[0]):
        return NotImplemented
    destination, deferred = args
    source = deferred.mx_source
    if source.real is not None or source.interceptor is not interceptor or deferred.requires_grad:
        return NotImplemented
    sizes, strides, _ = deferred.mx_layout
    dtype = deferred.dtype
    if sizes != destination.shape or 0 in strides or (dtype is not destination.dtype and dtype.is_complex):
        return NotImplemented
    if not destination.is_contiguous() and 0 in destination.stride():
        return NotImplemented
    # Conditions of torch for a tensor that is written in place.
    inference = destination.is_inference()
    if (inference and not _in_inference_mode()) or (destination.requires_grad and _grad_enabled()):
        return NotImplemented
    try:
        exclude_dispatch_key(PYTHON_KEY, True)
        exclude_dispatch_key(PYTHON_SNAPSHOT_KEY, True)
        interceptor.copied(deferred, destination)
    finally:
        exclude_dispatch_key(PYTHON_KEY, False)
        exclude_dispatch_key(PYTHON_SNAPSHOT_KEY, False)
    if not inference:
        _increment_version(destination)
    return destination


def _set_item(interceptor: Interceptor, args: tuple[Any, ...]) -> Any:
    """``target[index] = deferred``."""
    target, index, deferred = args
    if type(deferred) is not DeferredTensor or not is_ordinary(target) or not is_plain_index(index):
        return NotImplemented
    part = _view_item(interceptor, (target, index))
    if part is NotImplemented:
        return part
    return NotImplemented if _copy(interceptor, (part, deferred)) is NotImplemented else None


_view_item = _view(_GET_ITEM, LAYOUTS[_GET_ITEM])

#: Functions as torch passes them to a function mode -> their shortcut.
SHORTCUTS: Mapping[Any, Shortcut] = {
    **{func: _view(func, layout_of) for func, layout_of in LAYOUTS.items()},
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.copy_: _copy,
}
