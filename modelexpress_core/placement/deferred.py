"""Tensors whose bytes have not been read: a shape, a dtype, and where in a checkpoint the bytes lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from modelexpress_core.checkpoint import TensorInfo
from modelexpress_core.placement.dtypes import torch_dtype, torch_shape

if TYPE_CHECKING:
    from modelexpress_core.fetch import Ticket
    from modelexpress_core.placement.recording import Recorder

__all__ = ["DeferredTensor", "Source"]

_CPU = torch.device("cpu")


class Source:
    """One stored tensor during one load; all views of it share this.

    Attributes:
        info: Where its bytes lie.
        recorder: The load that it belongs to.
        meta: A meta tensor of the whole of it.
        used: Whether anything was read or copied from it.
        prefetched: Its bytes, where they are fetched ahead because it is small.
        prefetch: Tells when they have arrived.
        real: The whole of it as a plain tensor, once something wrote to it: from then on all views mean this memory.
    """

    __slots__ = ("info", "meta", "prefetch", "prefetched", "real", "recorder", "used")

    def __init__(self, info: TensorInfo, recorder: Recorder) -> None:
        self.info = info
        self.recorder = recorder
        self.meta = torch.empty(torch_shape(info), dtype=torch_dtype(info), device="meta")
        self.used = False
        self.prefetched: torch.Tensor | None = None
        self.prefetch: Ticket | None = None
        self.real: torch.Tensor | None = None


class DeferredTensor(torch.Tensor):
    """A view of a stored tensor that was not read.

    Looks like a tensor on the CPU. Views of it are deferred tensors too; ``destination.copy_(deferred)`` records where
    the bytes go; anything else reads them and goes on with a plain tensor. It can be used until its load ends.
    """

    _meta: torch.Tensor
    _source: Source
    _read: torch.Tensor | None

    # Straight to dispatch: nothing is decided at the level of torch functions.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's documented way

    @staticmethod
    def __new__(cls: type[DeferredTensor], source: Source, meta: torch.Tensor) -> DeferredTensor:
        """The view ``meta`` of ``source``."""
        self: DeferredTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=_CPU,
        )
        # What reaches for its memory past all that is watched here gets an error instead of a null pointer.
        torch._C._set_throw_on_mutable_data_ptr(self)
        self._meta = meta
        self._source = source
        self._read = None
        return self

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


def _tensors(values: Any) -> Any:
    """The tensors among the arguments of an operation, lists of tensors included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
