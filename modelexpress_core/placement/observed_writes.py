"""Which tensors are written completely while code runs, also if they are on the meta device and have no addresses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from modelexpress_core.placement.coverage import Coverage
from modelexpress_core.placement.deferred import DeferredTensor
from modelexpress_core.placement.memory import has_memory
from modelexpress_core.placement.operations import operation
from modelexpress_core.placement.torch_private import BypassModes, DispatchMode, storage_identity

__all__ = ["Copied", "ObservedWrites"]

#: Size, strides and offset in the storage of what was written, in elements, and what was copied to it.
Copied = tuple[tuple[int, ...], tuple[int, ...], int, torch.Tensor]

_COPY = torch.ops.aten.copy_.default

#: A plain dtype by the size of its elements.
_DTYPES: Mapping[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


class ObservedWrites(DispatchMode):
    """A block in which the writes of this thread to ``tensors`` are noted.

    Each storage has a shadow: memory of the same size that is never touched, so that it takes addresses only. A write
    to a view of the storage is noted as a write to the same view of the shadow.

    Args:
        tensors: The tensors by name, on any device. They may share storages.
        keep: Names of tensors for which ``copies_to`` returns what was copied to them.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], keep: Collection[str] = ()) -> None:
        super().__init__()
        self._shadows: dict[int, torch.Tensor] = {}
        self._owners = list(tensors.values())  # while they live, no other storage has the identity of theirs
        with BypassModes():
            self._coverage = Coverage({name: self._shadow(tensor) for name, tensor in tensors.items()})
            self._kept_names = {name: storage_identity(tensors[name]) for name in keep}
        self._kept: dict[int, list[Copied]] = {key: [] for key in self._kept_names.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute ``func``, and note what it wrote."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        what = operation(func)
        if what.written:
            with BypassModes():
                if func is _COPY and self._kept and not isinstance(args[0], DeferredTensor) and has_memory(args[0]):
                    written = args[0]
                    copies = self._kept.get(storage_identity(written), [])
                    copies.append((tuple(written.size()), written.stride(), int(written.storage_offset()), args[1]))
                for position in what.written:
                    if position < len(args):
                        self._note(args[position])
                for name in what.written_names & kwargs.keys():
                    self._note(kwargs[name])
        return result

    def missing(self) -> tuple[str, ...]:
        """Names of the tensors that were not written, or only in part."""
        return self._coverage.missing()

    @property
    def kept(self) -> frozenset[str]:
        """The names of the tensors for which ``copies_to`` returns what was copied to them."""
        return frozenset(self._kept_names)

    def copies_to(self, name: str) -> list[Copied]:
        """Return what was copied to parts of the tensor ``name``, one of ``keep``, or to others of its storage."""
        return self._kept[self._kept_names[name]]

    def _note(self, written: Any) -> None:
        if isinstance(written, (list, tuple)):
            for item in written:
                self._note(item)
        elif isinstance(written, torch.Tensor) and not isinstance(written, DeferredTensor):
            if not has_memory(written):
                self._coverage.wrote(written)
                return
            shadow = self._shadows.get(storage_identity(written))
            if shadow is not None:
                self._coverage.wrote(_same_view(shadow, written))

    def _shadow(self, tensor: torch.Tensor) -> torch.Tensor:
        if not has_memory(tensor):
            return tensor
        key = storage_identity(tensor)
        if key not in self._shadows:
            size = tensor.untyped_storage().nbytes()
            self._shadows[key] = torch.empty(size + -size % 16, dtype=torch.uint8, device="cpu")
        return _same_view(self._shadows[key], tensor)


def _same_view(shadow: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The part of ``shadow`` that ``tensor`` has of its own storage."""
    elements = shadow.view(_DTYPES[tensor.itemsize])
    return elements.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
