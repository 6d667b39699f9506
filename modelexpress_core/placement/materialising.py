"""From deferred tensors to plain ones: for operations that compute with them, and for code that writes to them."""

from __future__ import annotations

import threading
from collections import Counter

import torch

from modelexpress_core.placement.deferred import DeferredTensor, Source
from modelexpress_core.placement.pending_copies import PendingCopies
from modelexpress_core.placement.plan import Copy
from modelexpress_core.placement.strides import once, repeats_elements
from modelexpress_core.placement.torch_private import BypassModes
from modelexpress_core.resources import allocating

__all__ = ["Materialiser", "has_plain_bytes"]


class Materialiser:
    """Reads deferred tensors of one load. Thread-safe.

    Args:
        pending: The copies of the load, which fetch the bytes.
        lock: The lock of the load.

    Attributes:
        bytes: Bytes turned into plain tensors.
        operations: Reasons why, and how often.
    """

    def __init__(self, pending: PendingCopies, lock: threading.RLock) -> None:
        self._pending = pending
        self._lock = lock
        self.bytes = 0
        self.operations: Counter[str] = Counter()

    def materialise(self, deferred: DeferredTensor, reason: str) -> torch.Tensor:
        """A plain tensor with the elements of ``deferred``. Callers that hand it out clone it first if it is a view."""
        with self._lock, torch.inference_mode(mode=False), BypassModes():
            source, meta = deferred.mx_source, deferred.mx_meta
            if source.real is not None:
                shared = self.shared_memory(deferred)
                self._pending.settle(shared)
                return shared.clone()
            self._pending.check_usable(source.info)
            if deferred.mx_read is None:
                deferred.mx_read = self._read(source, meta)
                source.used = True
                self.bytes += meta.numel() * meta.itemsize
                self.operations[reason] += 1
            return deferred.mx_read

    def shared_memory(self, deferred: DeferredTensor) -> torch.Tensor:
        """The memory that every view of the stored tensor refers to from now on, because it may be written to."""
        with self._lock, torch.inference_mode(mode=False), BypassModes():
            source = deferred.mx_source
            if source.real is None:
                self._pending.check_usable(source.info)
                source.used = True
                if source.prefetched is not None:
                    self._pending.needed_bytes += source.info.length
                    source.real = self.prefetched_view(source, source.meta).clone()
                else:
                    source.real = self._fetched(source, source.meta)
                self.bytes += source.info.length
                self.operations["write"] += 1
            return _same_view(source.real, deferred.mx_meta)

    def prefetched_view(self, source: Source, meta: torch.Tensor) -> torch.Tensor:
        """The view ``meta`` of bytes that were fetched ahead. It is never handed out, only copies of it are."""
        if source.prefetched is None or source.prefetch is None:
            message = f"{source.info.name} was not fetched ahead"
            raise RuntimeError(message)
        self._pending.check_usable(source.info)
        self._pending.wait(source.prefetch)
        return _same_view(source.prefetched.view(source.dtype), meta)

    def _read(self, source: Source, meta: torch.Tensor) -> torch.Tensor:
        if source.prefetched is not None:
            self._pending.needed_bytes += meta.numel() * meta.itemsize
            return self.prefetched_view(source, meta).clone()
        if has_plain_bytes(meta):
            return self._fetched(source, meta)
        strides = meta.stride()
        return self._fetched(source, meta.as_strided(once(meta.shape, strides), strides)).expand(meta.shape).clone()

    def _fetched(self, source: Source, meta: torch.Tensor) -> torch.Tensor:
        """A new plain tensor with the elements of ``meta``, with the strides that a clone would have."""
        with allocating(f"the tensor {source.info.name}, with which the code computes"):
            real = torch.empty_strided(meta.size(), torch.empty_like(meta).stride(), dtype=meta.dtype, device="cpu")
        if meta.numel():
            self._pending.fetch_now(Copy(source.info, meta, real))
        return real


def has_plain_bytes(tensor: torch.Tensor) -> bool:
    """Whether the bytes of the tensor are its values, each element once."""
    return not (tensor.is_conj() or tensor.is_neg() or repeats_elements(tensor.shape, tensor.stride()))


def _same_view(whole: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """The view of the plain tensor ``whole`` that ``meta`` is of the meta tensor."""
    view = torch.empty(0, dtype=meta.dtype, device="cpu")
    start = whole.itemsize * whole.storage_offset()
    offset = meta.storage_offset() + start // meta.itemsize
    view.set_(whole.untyped_storage(), offset, meta.size(), meta.stride())
    return view
