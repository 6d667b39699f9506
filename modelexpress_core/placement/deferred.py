"""Tensors whose bytes have not been read: a shape, a dtype, and where the bytes are in a checkpoint."""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

import torch

from modelexpress_core.checkpoint import TensorInfo
from modelexpress_core.fetch import Ticket
from modelexpress_core.placement.dtypes import torch_dtype, torch_shape
from modelexpress_core.placement.strides import contiguous_strides
from modelexpress_core.placement.torch_private import (
    BypassModes,
    disabled_torch_function,
    make_wrapper,
    throw_on_data_pointer,
)
from modelexpress_core.placement.views import Layout

__all__ = ["DeferredTensor", "Interceptor", "Source", "deferred_view"]

_CPU = torch.device("cpu")


class Interceptor(Protocol):
    """Executes the operations of a load, for deferred tensors and torch's modes."""

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute ``func``, an operation of the thread that records."""

    def dispatch_elsewhere(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute ``func`` if no mode sees operations: in another thread, or after the load."""

    def prepare_escape(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments for ``func``, which hands out memory past dispatch."""

    def copied(self, deferred: DeferredTensor, destination: torch.Tensor) -> None:
        """Code copied ``deferred`` to ``destination``, bytes to bytes."""

    def materialise(self, deferred: DeferredTensor, reason: str) -> torch.Tensor:
        """A plain tensor with the elements of ``deferred``."""

    def shared_memory(self, deferred: DeferredTensor) -> torch.Tensor:
        """The memory that every view of the stored tensor refers to from now on."""


class Source:
    """One stored tensor during one load; all views of it share this.

    Attributes:
        info: Where its bytes are.
        interceptor: Executes the operations of its load.
        dtype: Its dtype in torch.
        shape: Its shape in torch.
        used: Whether anything was read or copied from it.
        prefetched: Its bytes, if it is small and they are fetched ahead.
        prefetch: Done when they have arrived.
        real: The whole of it as a plain tensor, once something wrote to it: all views refer to this memory then.
    """

    __slots__ = ("_meta", "dtype", "info", "interceptor", "prefetch", "prefetched", "real", "shape", "used")

    def __init__(self, info: TensorInfo, interceptor: Interceptor) -> None:
        self.info = info
        self.interceptor = interceptor
        self.dtype = torch_dtype(info)
        self.shape = torch_shape(info)
        self.used = False
        self.prefetched: torch.Tensor | None = None
        self.prefetch: Ticket | None = None
        self.real: torch.Tensor | None = None
        self._meta: torch.Tensor | None = None

    @property
    def meta(self) -> torch.Tensor:
        """A meta tensor of the whole of it, made at first use."""
        if self._meta is None:
            with BypassModes():
                self._meta = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self._meta

    def whole(self) -> DeferredTensor:
        """All of it, deferred."""
        return deferred_view(self, (self.shape, contiguous_strides(self.shape), 0), self.dtype)


class DeferredTensor(torch.Tensor):
    """A view of a stored tensor that was not read.

    It looks like a tensor on the CPU. Views of it are deferred tensors too; ``destination.copy_(deferred)`` records
    where the bytes go; any other operation reads them and goes on with a plain tensor. It can be used until its load
    ends. Engines set attributes of many names on tensors, so those here have a prefix.

    Attributes:
        mx_source: The stored tensor.
        mx_layout: Which of its elements this view has.
        mx_read: Its elements as a plain tensor, once they were read.
        mx_meta_view: This view of the meta tensor of its source, once ``mx_meta`` was asked for.
    """

    __slots__ = ("mx_layout", "mx_meta_view", "mx_read", "mx_source")

    mx_source: Source
    mx_layout: Layout
    mx_read: torch.Tensor | None
    mx_meta_view: torch.Tensor | None

    # Straight to dispatch: at the level of torch functions only the function mode of a load decides.
    __torch_function__ = disabled_torch_function

    @property
    def mx_meta(self) -> torch.Tensor:
        """This view of the meta tensor of its source."""
        if self.mx_meta_view is None:
            with BypassModes():
                sizes, strides, offset = self.mx_layout
                meta = torch.empty(0, dtype=self.dtype, device="meta")
                self.mx_meta_view = meta.set_(self.mx_source.meta.untyped_storage(), offset, sizes, strides)
        return self.mx_meta_view

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own annotation lacks the class
        cls,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        """Called outside the recording mode: in another thread, or after the load has ended."""
        for value in _tensors((*args, *(kwargs or {}).values())):
            if isinstance(value, DeferredTensor):
                return value.mx_source.interceptor.dispatch_elsewhere(func, args, kwargs or {})
        return NotImplemented

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name, shape and dtype; nothing is read for it."""
        return f"DeferredTensor({self.mx_source.info.name}, shape={list(self.shape)}, dtype={self.dtype})"

    # -- access to the bytes that does not pass through dispatch -----------------------------------------------------

    def _plain(self) -> torch.Tensor:
        """A plain tensor with a copy of the bytes."""
        return self.mx_source.interceptor.materialise(self, "python").clone()

    def _memory(self) -> torch.Tensor:
        """A plain tensor over the memory that all views of the stored tensor share from now on."""
        return self.mx_source.interceptor.shared_memory(self)

    def __format__(self, spec: str) -> str:
        return format(self._plain().item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def tolist(self) -> Any:
        return self._plain().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return self._memory().numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._memory().__array__(*args, **kwargs)

    def data_ptr(self) -> int:
        return self._memory().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._memory().untyped_storage()

    def storage(self) -> Any:
        return self._memory().storage()

    def apply_(self, *args: Any) -> Any:
        return self._memory().apply_(*args)

    def map_(self, *args: Any) -> Any:
        return self._memory().map_(*args)

    def map2_(self, *args: Any) -> Any:
        return self._memory().map2_(*args)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._memory().__dlpack__(**kwargs)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self._plain()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    def share_memory_(self) -> NoReturn:
        message = f"{self!r} cannot be moved into shared memory; clone it first"
        raise RuntimeError(message)


def deferred_view(
    source: Source, layout: Layout, dtype: torch.dtype, meta: torch.Tensor | None = None
) -> DeferredTensor:
    """The view of ``source`` with ``layout``, in elements of ``dtype``; ``meta``: the same view of its meta tensor."""
    sizes, strides, offset = layout
    view: DeferredTensor = make_wrapper(  # by position, which torch takes in half the time
        DeferredTensor, sizes, strides, offset, None, dtype, torch.strided, _CPU
    )
    throw_on_data_pointer(view)
    view.mx_source = source
    view.mx_layout = layout
    view.mx_read = None
    view.mx_meta_view = meta
    return view


def _tensors(values: Any) -> Any:
    """The tensors among the arguments of an operation, lists of tensors included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
