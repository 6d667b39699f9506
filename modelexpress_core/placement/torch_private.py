"""All of torch's private API that ModelExpress uses, each part with the reason why no public one does.

Wrapper subclasses and modes are extension points that torch's documentation describes
(https://pytorch.org/docs/stable/notes/extending.html), although their names begin with an underscore. The rest is here
for speed: it is called for each of the 100,000 tensors of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "COMPOSITE_KEY",
    "PYTHON_KEY",
    "PYTHON_SNAPSHOT_KEY",
    "BypassModes",
    "DisableTorchFunction",
    "DisableTorchFunctionSubclass",
    "DispatchMode",
    "call_composite",
    "disabled_torch_function",
    "dispatch_keys",
    "dispatch_mode_count",
    "exclude_dispatch_key",
    "is_alias_of",
    "is_composite",
    "is_dispatch_key_excluded",
    "make_wrapper",
    "module_tables",
    "schema_of",
    "storage_identity",
    "throw_on_data_pointer",
    "without_dispatch",
]

# -- tensors without memory -------------------------------------------------------------------------------------------

#: Makes a tensor of a subclass, with sizes and strides and without memory: torch's documented way.
make_wrapper: Callable[..., Any] = torch.Tensor._make_wrapper_subclass

#: Code that asks a tensor for its pointer past dispatch gets an error instead of a null pointer.
throw_on_data_pointer: Callable[[torch.Tensor], None] = torch._C._set_throw_on_mutable_data_ptr

#: As ``__torch_function__`` of a class: no override at the level of functions. torch's documented way.
disabled_torch_function: Any = torch._C._disabled_torch_function_impl

#: Whether a tensor shares the storage of another. A view of a tensor without memory has no pointer to compare.
is_alias_of: Callable[[Any, torch.Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]  # not in the stubs


def storage_identity(tensor: torch.Tensor) -> int:
    """A number that tensors have in common if they share a storage, also one without memory, while it lives."""
    return int(tensor.untyped_storage()._cdata)


# -- modes ------------------------------------------------------------------------------------------------------------

#: Blocks without overrides at the level of functions: for modes and classes, and for classes alone.
DisableTorchFunction: Callable[[], Any] = torch._C.DisableTorchFunction
DisableTorchFunctionSubclass: Callable[[], Any] = torch._C.DisableTorchFunctionSubclass

#: A block whose operations no mode of dispatch sees.
without_dispatch: Callable[[], Any] = torch._C._DisableTorchDispatch


class BypassModes:
    """A block whose operations are ours and on plain tensors: neither modes nor subclasses see them."""

    __slots__ = ("_dispatch", "_function")

    def __enter__(self) -> None:
        self._function = DisableTorchFunction()
        self._dispatch = without_dispatch()
        self._function.__enter__()
        self._dispatch.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._dispatch.__exit__(None, None, None)
        self._function.__exit__(None, None, None)


class DispatchMode(TorchDispatchMode):
    """A mode that sees every operation of the thread. ``TorchDispatchMode`` is documented, its module is private."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Saves a second of imports at the first operation, and time at each: nothing is compiled while weights load.
        return False


# -- dispatch ---------------------------------------------------------------------------------------------------------

#: How many modes of dispatch the thread is in. The public function that says it builds a list of them.
dispatch_mode_count: Callable[[], int] = torch._C._len_torch_dispatch_stack

#: Dispatch keys that are switched off for the thread. Switching two off costs a tenth of a microsecond, entering
#: ``BypassModes`` ten times that.
is_dispatch_key_excluded: Callable[[Any], bool] = torch._C._dispatch_tls_is_dispatch_key_excluded
exclude_dispatch_key: Callable[[Any, bool], None] = torch._C._dispatch_tls_set_dispatch_key_excluded

#: While both are excluded, no mode of dispatch sees an operation.
PYTHON_KEY: Any = torch._C.DispatchKey.Python
PYTHON_SNAPSHOT_KEY: Any = torch._C.DispatchKey.PythonTLSSnapshot
#: Kernels that are made of other operations.
COMPOSITE_KEY: Any = torch._C.DispatchKey.CompositeImplicitAutograd

#: What torch looks at to choose a kernel for a tensor. Nothing else says as fast that a tensor is an ordinary one.
dispatch_keys: Callable[[torch.Tensor], Any] = torch._C._dispatch_keys


def schema_of(operation: Any) -> Any:
    """Arguments and results of an operation, with what it writes and what shares memory: only the schema says so."""
    return operation._schema


def is_composite(operation: Any) -> bool:
    """Whether ``operation`` is made of other operations."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"))


def call_composite(operation: Any, args: Any, kwargs: Any) -> Any:
    """Take ``operation`` apart into those that it is made of, and do them."""
    return operation._op_dk(COMPOSITE_KEY, *args, **kwargs)


# -- modules ----------------------------------------------------------------------------------------------------------


def module_tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and buffers of ``module`` itself, to be replaced: ``Module.to_empty`` writes to the same tables."""
    return module._parameters, module._buffers
