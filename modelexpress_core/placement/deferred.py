"""Tensors whose bytes have not been read: a shape, a dtype, and where in a checkpoint the bytes lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from modelexpress_core.checkpoint import TensorInfo
from modelexpress_core.placement.dtypes import torch_dtype, torch_shape
from modelexpress_core.placement.views import Layout

if TYPE_CHECKING:
    from modelexpress_core.fetch import Ticket
    from modelexpress_core.placement.recording import Recorder

__all__ = ["DeferredTensor", "Source", "Unwatched", "deferred_view"]

_make_wrapper = torch.Tensor._make_wrapper_subclass
_CPU = torch.device("cpu")


class Unwatched:
    """A block whose operations are ours and on plain tensors: no mode is asked."""

    __slots__ = ("_dispatch", "_function")

    def __enter__(self) -> None:
        self._function = torch._C.DisableTorchFunction()
        self._dispatch = torch._C._DisableTorchDispatch()
        self._function.__enter__()
        self._dispatch.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._dispatch.__exit__(None, None, None)
        self._function.__exit__(None, None, None)


class Source:
    """One stored tensor during one load; all views of it share this.

    Attributes:
        info: Where its bytes lie.
        recorder: The load that it belongs to.
        dtype: In torch's words.
        shape: As torch has it.
        used: Whether anything was read or copied from it.
        prefetched: Its bytes, where they are fetched ahead because it is small.
        prefetch: Tells when they have arrived.
        real: The whole of it as a plain tensor, once something wrote to it: from then on all views mean this memory.
    """

    __slots__ = ("_meta", "dtype", "info", "prefetch", "prefetched", "real", "recorder", "shape", "used")

    def __init__(self, info: TensorInfo, recorder: Recorder) -> None:
        self.info = info
        self.recorder = recorder
        self.dtype = torch_dtype(info)
        self.shape = torch_shape(info)
        self.used = False
        self.prefetched: torch.Tensor | None = None
        self.prefetch: Ticket | None = None
        self.real: torch.Tensor | None = None
        self._meta: torch.Tensor | None = None

    @property
    def meta(self) -> torch.Tensor:
        """A meta tensor of the whole of it, made when it is asked for."""
        if self._meta is None:
            with Unwatched():
                self._meta = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self._meta

    def whole(self) -> DeferredTensor:
        """All of it, deferred."""
        shape = self.shape
        step = 1
        strides = []
        for size in reversed(shape):
            strides.append(step)
            step *= size or 1
        return deferred_view(self, (shape, tuple(strides[::-1]), 0), self.dtype)


class DeferredTensor(torch.Tensor):
    """A view of a stored tensor that was not read.

    Looks like a tensor on the CPU. Views of it are deferred tensors too; ``destination.copy_(deferred)`` records where
    the bytes go; anything else reads them and goes on with a plain tensor. It can be used until its load ends.
    """

    __slots__ = ("_given_meta", "_layout", "_read", "_source")

    _source: Source
    _layout: Layout
    _given_meta: torch.Tensor | None
    _read: torch.Tensor | None

    # Straight to dispatch: at the level of torch functions only the mode of the recorder decides anything.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's documented way

    @property
    def _meta(self) -> torch.Tensor:
        """This view of the meta tensor of its source."""
        if self._given_meta is None:
            with Unwatched():
                sizes, strides, offset = self._layout
                meta = torch.empty(0, dtype=self.dtype, device="meta")
                self._given_meta = meta.set_(self._source.meta.untyped_storage(), offset, sizes, strides)
        return self._given_meta

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own annotation lacks the class
        cls,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        """Reached outside the recording mode: in another thread, or after the load has ended."""
        for value in _tensors((*args, *(kwargs or {}).values())):
            if isinstance(value, DeferredTensor):
                return value._source.recorder.dispatch_elsewhere(func, args, kwargs or {})
        return NotImplemented

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name, shape and dtype; nothing is read for it."""
        return f"DeferredTensor({self._source.info.name}, shape={list(self.shape)}, dtype={self.dtype})"

    # Ways to the bytes that do not pass through dispatch.

    def _plain(self) -> torch.Tensor:
        """A plain tensor with a copy of the bytes."""
        return self._source.recorder.materialise(self, "python").clone()

    def _memory(self) -> torch.Tensor:
        """A plain tensor over the memory that all views of the stored tensor share from now on."""
        return self._source.recorder.shared_memory(self)

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
    """The view of ``source`` that has ``layout``, in elements of ``dtype``, which ``meta`` is of its meta tensor."""
    sizes, strides, offset = layout
    view: DeferredTensor = _make_wrapper(  # by position, which torch takes in half the time
        DeferredTensor, sizes, strides, offset, None, dtype, torch.strided, _CPU
    )
    # What reaches for its memory past all that is watched here gets an error instead of a null pointer.
    torch._C._set_throw_on_mutable_data_ptr(view)
    view._source = source
    view._layout = layout
    view._given_meta = meta
    view._read = None
    return view


def _tensors(values: Any) -> Any:
    """The tensors among the arguments of an operation, lists of tensors included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
