"""What loading does to every weight, done without torch's dispatch, which takes several times as long to ask.

An expert of a mixture-of-experts checkpoint costs five operations: three views of the parameter, one of the weight, a
copy. Here are those, in their plain forms. They do what ``Recorder.dispatch`` would; for all else, and wherever there
is any doubt, the answer is NotImplemented, nothing was done, and torch goes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from modelexpress_core.placement.deferred import DeferredTensor, deferred_view
from modelexpress_core.placement.memory import PLAIN_CLASSES, is_ordinary
from modelexpress_core.placement.views import LAYOUTS, LayoutOf, is_plain_index

if TYPE_CHECKING:
    from modelexpress_core.placement.recording import Recorder

__all__ = ["SHORTCUTS", "Shortcut"]

#: Takes the recorder whose mode is the only one, and the arguments of a torch function.
Shortcut = Callable[["Recorder", tuple[Any, ...]], Any]

#: While these are excluded, no mode of dispatch sees an operation.
_PYTHON = torch._C.DispatchKey.Python
_SNAPSHOT = torch._C.DispatchKey.PythonTLSSnapshot
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
_grad_enabled = torch.is_grad_enabled
_in_inference_mode = torch.is_inference_mode_enabled
_increment_version = torch.autograd.graph.increment_version
_STRIDED = torch.strided
_GET_ITEM: Any = torch.Tensor.__getitem__


def _view(func: Any, layout_of: LayoutOf) -> Shortcut:
    """The shortcut for ``func``, which looks at its first argument anew."""

    def view(_: Recorder, args: tuple[Any, ...]) -> Any:
        tensor = args[0]
        kind = type(tensor)
        if kind is DeferredTensor:
            source = tensor._source
            if source.real is not None or tensor.requires_grad or tensor.is_inference() is not _in_inference_mode():
                return NotImplemented
            layout = layout_of(tensor._layout, args)
            return NotImplemented if layout is None else deferred_view(source, layout, tensor.dtype)
        if kind not in PLAIN_CLASSES or tensor.layout is not _STRIDED or tensor.is_nested:
            return NotImplemented
        for value in args[1:]:
            if type(value) is not int and not (func is _GET_ITEM and is_plain_index(value)):
                return NotImplemented
        # Plain memory looked at anew is nothing that has to be known.
        try:
            _exclude(_PYTHON, True)
            _exclude(_SNAPSHOT, True)
            return func(*args)
        finally:
            _exclude(_PYTHON, False)
            _exclude(_SNAPSHOT, False)

    return view


def _copy(recorder: Recorder, args: tuple[Any, ...]) -> Any:
    """``destination.copy_(deferred)``."""
    if len(args) != 2 or type(args[1]) is not DeferredTensor or not is_ordinary(args[0]):
        return NotImplemented
    destination, deferred = args
    source = deferred._source
    if source.real is not None or source.recorder is not recorder or deferred.requires_grad:
        return NotImplemented
    sizes, strides, _ = deferred._layout
    dtype = deferred.dtype
    if sizes != destination.shape or 0 in strides or (dtype is not destination.dtype and dtype.is_complex):
        return NotImplemented
    if not destination.is_contiguous() and 0 in destination.stride():
        return NotImplemented
    # What torch asks of a tensor that is written in place.
    inference = destination.is_inference()
    if (inference and not _in_inference_mode()) or (destination.requires_grad and _grad_enabled()):
        return NotImplemented
    try:
        _exclude(_PYTHON, True)
        _exclude(_SNAPSHOT, True)
        recorder.copied(deferred, destination)
    finally:
        _exclude(_PYTHON, False)
        _exclude(_SNAPSHOT, False)
    if not inference:
        _increment_version(destination)
    return destination


def _set_item(recorder: Recorder, args: tuple[Any, ...]) -> Any:
    """``target[index] = deferred``."""
    target, index, deferred = args
    if type(deferred) is not DeferredTensor or not is_ordinary(target) or not is_plain_index(index):
        return NotImplemented
    part = _view_item(recorder, (target, index))
    if part is NotImplemented:
        return part
    return NotImplemented if _copy(recorder, (part, deferred)) is NotImplemented else None


_view_item = _view(_GET_ITEM, LAYOUTS[_GET_ITEM])

#: Functions of tensors, as torch hands them to a function mode.
SHORTCUTS: Mapping[Any, Shortcut] = {
    **{func: _view(func, layout_of) for func, layout_of in LAYOUTS.items()},
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.copy_: _copy,
}
