"""torch's modes: which operations of a thread are intercepted.

All that are dispatched, and the methods that give access to memory past dispatch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from modelexpress_core.placement.deferred import Interceptor
from modelexpress_core.placement.shortcuts import SHORTCUTS
from modelexpress_core.placement.torch_private import (
    PYTHON_KEY,
    DispatchMode,
    dispatch_mode_count,
    is_dispatch_key_excluded,
)

__all__ = ["SET_DATA", "STORAGE_ESCAPES", "FunctionMode", "RecordingMode"]

#: Methods that are no operations and give access to a whole storage, which other tensors may share.
STORAGE_ESCAPES = frozenset(
    {
        torch.Tensor.__deepcopy__,
        torch.Tensor.share_memory_,
        torch.Tensor.storage,
        torch.Tensor.untyped_storage,
    }
)
#: ``tensor.data = other``: it would give a tensor the memory that a deferred one does not have.
SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]  # the stubs show its value's type
#: All methods that are no operations and give access to memory.
_ESCAPES = STORAGE_ESCAPES | {
    SET_DATA,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.__format__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.__repr__,
    torch.Tensor.apply_,
    torch.Tensor.data_ptr,
    torch.Tensor.map_,
    torch.Tensor.map2_,
    torch.Tensor.numpy,
    torch.Tensor.tolist,
}


class RecordingMode(DispatchMode):
    """Hands every operation of the thread to the interceptor."""

    def __init__(self, interceptor: Interceptor) -> None:
        super().__init__()
        self._interceptor = interceptor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._interceptor.dispatch(func, args, kwargs or {})


class FunctionMode(TorchFunctionMode):
    """Takes shortcuts, and completes copies to a tensor before its memory is handed out past dispatch."""

    def __init__(self, interceptor: Interceptor) -> None:
        super().__init__()
        self._interceptor = interceptor

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shortcut = SHORTCUTS.get(func)
        if shortcut is not None:
            # No shortcut if other modes of dispatch may have to see the operation, or modes are switched off.
            if not kwargs and dispatch_mode_count() == 1 and not is_dispatch_key_excluded(PYTHON_KEY):
                result = shortcut(self._interceptor, args)
                if result is not NotImplemented:
                    return result
        elif func in _ESCAPES:
            args = self._interceptor.prepare_escape(func, args)
        return func(*args, **(kwargs or {}))
