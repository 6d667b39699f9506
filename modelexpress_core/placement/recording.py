"""Recording what code does with deferred tensors, and keeping the order in which it does it.

While a load records, every torch operation of the thread passes through here. Three things can happen to it:

- it looks at a deferred tensor anew (``narrow``, ``view``, ``t``): the meta tensor is looked at, nothing is read;
- it copies a deferred tensor to a place: the copy is recorded and fetched in the background;
- it is anything else: what it reads or writes is made real first. Deferred tensors among its arguments are read,
  and copies to memory that it touches are completed. Correctness does not depend on knowing the operation.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from modelexpress_core.checkpoint import Checkpoint, TensorInfo
from modelexpress_core.errors import PlacementError
from modelexpress_core.fetch import FetchEngine
from modelexpress_core.placement.coverage import Coverage
from modelexpress_core.placement.deferred import DeferredTensor, Source
from modelexpress_core.placement.memory import PendingMemory, region_of
from modelexpress_core.placement.operations import Operation, operation
from modelexpress_core.placement.plan import Copy, ReadPlanner

__all__ = ["Recorder"]

#: Tensors up to this size are fetched ahead, in merged reads, so that computing with them costs no round trip ...
_SMALL_BYTES = 64 << 10
#: ... as long as they make up no more than this part of the checkpoint (a rank may not need them all) ...
_SMALL_SHARE = 0.02
#: ... and of memory.
_SMALL_TOTAL_BYTES = 256 << 20

#: Recorded copies are handed to the engine when this many bytes or copies have come together.
_BATCH_BYTES = 64 << 20
_BATCH_COPIES = 256

#: Completed copies are forgotten when this many are kept.
_PURGE_COPIES = 4096

#: Ways from a tensor to its memory that are no operations.
_ESCAPES = frozenset(
    {
        torch.Tensor.__array__,
        torch.Tensor.__dlpack__,
        torch.Tensor.__reduce_ex__,
        torch.Tensor.data_ptr,
        torch.Tensor.numpy,
        torch.Tensor.storage,
        torch.Tensor.tolist,
        torch.Tensor.untyped_storage,
    }
)

_COPY = torch.ops.aten.copy_.default


class Recorder:
    """What is recorded and read during one load.

    Args:
        checkpoint: What is loaded.
        engine: Fetches it.
        coverage: Told of every write, where it matters which tensors are written.
    """

    def __init__(self, checkpoint: Checkpoint, engine: FetchEngine, coverage: Coverage | None = None) -> None:
        self._checkpoint = checkpoint
        self._engine = engine
        self._planner = ReadPlanner(engine.chunk_bytes, engine.capabilities.request_cost_bytes)
        self._coverage = coverage
        self._lock = threading.RLock()
        self._thread = 0
        self._mode = _RecordingMode(self)
        self._escapes = _EscapeMode(self)
        self._pending: PendingMemory[Copy] = PendingMemory()
        self._unsubmitted: list[Copy] = []
        self._unsubmitted_bytes = 0
        self._ended = False
        self._sources: dict[str, Source] = {}
        self.needed_bytes = 0
        self.materialised_bytes = 0
        self.materialised_operations: Counter[str] = Counter()
        self.meta_destinations = 0

    # -- for the loader -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        self._thread = threading.get_ident()
        self._prefetch()
        self._escapes.__enter__()
        self._mode.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._mode.__exit__(None, None, None)
        self._escapes.__exit__(None, None, None)
        self._thread = 0

    def deferred(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the checkpoint, deferred, in the order of files and of bytes in them."""
        for name, info in self._checkpoint.tensors.items():
            source = self._source(name, info)
            yield name, DeferredTensor(source, source.meta)

    def place(self, info: TensorInfo, destination: torch.Tensor) -> None:
        """Copy the whole of the stored tensor ``info`` to ``destination``, which has its shape."""
        source = self._source(info.name, info)
        with self._lock:
            source.used = True
            self._record(source, source.meta, destination)

    def finish(self) -> None:
        """Complete everything that was recorded; deferred tensors cannot be used any more."""
        with self._lock:
            self._submit()
            self._engine.finish()
            self.end()

    def end(self) -> None:
        """Deferred tensors cannot be used any more."""
        self._ended = True

    @property
    def tensors_used(self) -> int:
        """Tensors of the checkpoint of which anything was copied or read."""
        return sum(source.used for source in self._sources.values())

    @property
    def files_used(self) -> int:
        """Files that those are in."""
        return len({source.info.file for source in self._sources.values() if source.used})

    # -- dispatch -----------------------------------------------------------------------------------------------------

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do ``func``, an operation of the thread that records."""
        if func is _COPY and isinstance(args[1], DeferredTensor) and not isinstance(args[0], DeferredTensor):
            with self._lock:
                return self._copy(args, kwargs)
        what = operation(func)
        if what.view:
            return self._view(func, what, args, kwargs)
        with self._lock:
            return self._compute(func, what, args, kwargs)

    def dispatch_elsewhere(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do ``func`` where no mode watches: other operations cannot be ordered after it, so it is completed."""
        result = self.dispatch(func, args, kwargs)
        if threading.get_ident() != self._thread:
            with self._lock:
                self._complete(self._unsubmitted)
                self._engine.wait([copy for copy in self._pending.owners() if not copy.done])
        return result

    def settle(self, values: Iterable[Any]) -> None:
        """Complete the copies to memory of the tensors among ``values``."""
        with self._lock:
            for value in values:
                if isinstance(value, torch.Tensor) and not isinstance(value, DeferredTensor):
                    self._settle(value)

    def _copy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        destination: torch.Tensor = args[0]
        deferred: DeferredTensor = args[1]
        source, meta = deferred._source, deferred._meta
        source.used = True
        if source.real is None and _has_memory(destination):
            shape = destination.shape
            view = meta if meta.shape == shape else meta.expand(shape)
            if destination.device.type == "meta":
                self.meta_destinations += 1
                return destination
            if _can_be_read(view) and _can_be_written(destination):
                if source.prefetched is not None:
                    self.needed_bytes += meta.numel() * meta.itemsize
                    self._settle(destination)
                    self._wrote(destination)
                    destination.copy_(self._prefetched_view(source, view))
                else:
                    self._record(source, view, destination)
                return destination
        return self._compute(_COPY, operation(_COPY), args, kwargs)

    def _view(self, func: Any, what: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args else None
        if isinstance(first, DeferredTensor):
            source = first._source
            if source.real is None:
                plain = [a._meta if isinstance(a, DeferredTensor) else a for a in args]
                result = func(*plain, **kwargs)
                if _all_alias(result, first._meta):
                    return _wrapped(result, source)
            with self._lock:
                return self._compute(func, what, args, kwargs)
        if isinstance(first, torch.Tensor) and not any(isinstance(a, DeferredTensor) for a in args[1:]):
            result = func(*args, **kwargs)
            if not len(self._pending) or _all_alias(result, first):
                return result
        # It copied instead: do it again, with what it reads in place.
        with self._lock:
            return self._compute(func, what, args, kwargs)

    def _compute(self, func: Any, what: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if what.shape_only and isinstance(args[0], DeferredTensor):
            return self._shape_only(func, args, kwargs)
        new_args = tuple(self._made_real(value, what, position in what.written) for position, value in enumerate(args))
        new_kwargs = {key: self._made_real(value, what, key in what.written_names) for key, value in kwargs.items()}
        return func(*new_args, **new_kwargs)

    def _made_real(self, value: Any, what: Operation, written: bool) -> Any:
        if isinstance(value, DeferredTensor):
            if written and what.reshapes_in_place:
                message = f"{what.name} changes the shape of {value!r} in place, which a deferred tensor cannot follow"
                raise PlacementError(
                    message, tensor=value._source.info.name, hint="use the operation that returns a view instead"
                )
            if written or value._source.real is not None:
                value = self.shared_memory(value)
            else:
                plain = self.materialise(value, what.name)
                # An operation that may return its very input must not return what we keep for the next reader.
                return plain.clone() if what.view else plain
        if isinstance(value, torch.Tensor):
            self._settle(value)
            if written:
                self._wrote(value)
            return value
        if isinstance(value, (list, tuple)):
            return type(value)([self._made_real(item, what, written) for item in value])
        return value

    def _shape_only(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        if kwargs.get("device") is None:
            kwargs["device"] = torch.device("cpu")
        return func(args[0]._meta, *args[1:], **kwargs)

    # -- copies -------------------------------------------------------------------------------------------------------

    def _record(self, source: Source, view: torch.Tensor, destination: torch.Tensor) -> Copy | None:
        """The copy of ``view`` to ``destination``, on its way; None where there is nothing to copy."""
        self._check_usable(source.info)
        region = region_of(destination)
        if region is None:
            return None
        if len(self._pending):
            self._complete(self._pending.overlapping(region))
        copy = Copy(source.info, view, destination)
        self.needed_bytes += copy.needed_bytes
        self._pending.add(region, copy)
        if len(self._pending) >= _PURGE_COPIES:
            self._pending.purge()
        self._wrote(destination)
        self._unsubmitted.append(copy)
        self._unsubmitted_bytes += copy.needed_bytes
        if self._unsubmitted_bytes >= _BATCH_BYTES or len(self._unsubmitted) >= _BATCH_COPIES:
            self._submit()
        return copy

    def _submit(self, *, urgent: bool = False) -> None:
        copies, self._unsubmitted, self._unsubmitted_bytes = self._unsubmitted, [], 0
        if copies:
            self._engine.submit(self._planner.batches(copies), urgent=urgent)

    def _complete(self, copies: Iterable[Copy]) -> None:
        waiting = [copy for copy in copies if not copy.done]
        if waiting:
            self._submit(urgent=True)
            self._engine.wait(waiting)

    def _settle(self, tensor: torch.Tensor) -> None:
        """Complete the copies to memory of ``tensor``."""
        if not len(self._pending) or tensor.device.type == "meta":
            return
        region = region_of(tensor) if _has_memory(tensor) else None
        if region is not None:
            self._complete(self._pending.overlapping(region))
        elif not _has_memory(tensor):  # we cannot tell which memory it stands for
            self._complete(self._pending.owners())

    def _wrote(self, tensor: torch.Tensor) -> None:
        if self._coverage is not None and _has_memory(tensor):
            self._coverage.wrote(tensor)

    # -- real tensors -------------------------------------------------------------------------------------------------

    def materialise(self, deferred: DeferredTensor, reason: str) -> torch.Tensor:
        """A plain tensor with the elements of ``deferred``; ``reason`` is counted in the report."""
        with self._lock, torch.inference_mode(mode=False):
            source, meta = deferred._source, deferred._meta
            if source.real is not None:
                shared = self.shared_memory(deferred)
                self._settle(shared)
                return shared.clone()
            self._check_usable(source.info)
            if deferred._read is None:
                deferred._read = self._read(source, meta)
                source.used = True
                self.materialised_bytes += meta.numel() * meta.itemsize
                self.materialised_operations[reason] += 1
            return deferred._read

    def _read(self, source: Source, meta: torch.Tensor) -> torch.Tensor:
        if source.prefetched is not None:
            self.needed_bytes += meta.numel() * meta.itemsize
            return self._prefetched_view(source, meta).clone()
        if meta.is_conj() or meta.is_neg():  # values that are not the bytes: torch makes them of the bytes
            return _same_view(self._fetched(source, source.meta), meta).clone()
        if not _can_be_read(meta):
            strides = meta.stride()
            once = [size if stride else min(size, 1) for size, stride in zip(meta.shape, strides, strict=True)]
            return self._fetched(source, meta.as_strided(once, strides)).expand(meta.shape).clone()
        return self._fetched(source, meta)

    def _fetched(self, source: Source, meta: torch.Tensor) -> torch.Tensor:
        """A new plain tensor with the elements of ``meta``, with the strides that a clone would have."""
        real = torch.empty_strided(meta.size(), torch.empty_like(meta).stride(), dtype=meta.dtype, device="cpu")
        copy = self._record(source, meta, real)
        if copy is not None:
            self._complete([copy])
        return real

    def shared_memory(self, deferred: DeferredTensor) -> torch.Tensor:
        """The memory that every view of the stored tensor means, from now on, because it may be written to."""
        with self._lock, torch.inference_mode(mode=False):
            source = deferred._source
            if source.real is None:
                self._check_usable(source.info)
                source.used = True
                if source.prefetched is not None:
                    self.needed_bytes += source.info.length
                    source.real = self._prefetched_view(source, source.meta).clone()
                else:
                    source.real = self._fetched(source, source.meta)
                self.materialised_bytes += source.info.length
                self.materialised_operations["write"] += 1
            return _same_view(source.real, deferred._meta)

    def _prefetched_view(self, source: Source, meta: torch.Tensor) -> torch.Tensor:
        """The view ``meta`` of bytes that were fetched ahead. Never handed out: a copy of it is."""
        if source.prefetched is None or source.prefetch is None:
            message = f"{source.info.name} was not fetched ahead"
            raise RuntimeError(message)
        self._check_usable(source.info)
        if not source.prefetch.done:
            self._engine.wait([source.prefetch])
        return _same_view(source.prefetched.view(source.meta.dtype), meta)

    # -- small tensors ------------------------------------------------------------------------------------------------

    def _source(self, name: str, info: TensorInfo) -> Source:
        source = self._sources.get(name)
        if source is None:
            source = self._sources[name] = Source(info, self)
        return source

    def _prefetch(self) -> None:
        """Fetch the small tensors ahead, smallest first, as far as their share allows."""
        left = min(_SMALL_TOTAL_BYTES, int(self._checkpoint.tensor_bytes * _SMALL_SHARE))
        small = []
        for info in sorted(self._checkpoint.tensors.values(), key=lambda info: info.length):
            if info.length > _SMALL_BYTES or info.length > left:
                break
            if info.length:
                left -= info.length
                small.append(info)
        if not small:
            return
        # Each on a boundary that suits every dtype.
        buffer = torch.empty(sum(-(-info.length // 16) * 16 for info in small), dtype=torch.uint8, device="cpu")
        copies, position = [], 0
        for info in small:
            source = self._source(info.name, info)
            source.prefetched = buffer[position : position + info.length]
            stored = torch.empty(info.length, dtype=torch.uint8, device="meta")
            source.prefetch = copy = Copy(info, stored, source.prefetched)
            copies.append(copy)
            position += -(-info.length // 16) * 16
        self._engine.submit(self._planner.batches(copies), urgent=True)

    def _check_usable(self, info: TensorInfo) -> None:
        if self._ended:
            message = f"the deferred tensor {info.name} is used after its load has ended"
            raise PlacementError(
                message, tensor=info.name, hint="copy or clone it inside the with block of deferred_weights"
            )


class _RecordingMode(TorchDispatchMode):
    """Hands every operation of the thread to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Saves a second of imports at the first operation, and time at each: nothing is compiled while weights load.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.dispatch(func, args, kwargs or {})


class _EscapeMode(TorchFunctionMode):
    """Completes copies to a tensor before its memory is handed out past dispatch."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ESCAPES:
            self._recorder.settle(args)
        return func(*args, **(kwargs or {}))


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a strided one whose memory is its own, not that of a wrapping class."""
    plain = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return plain and tensor.layout is torch.strided and not tensor.is_quantized


def _can_be_read(view: torch.Tensor) -> bool:
    """Whether the bytes of the view are its values, each element once."""
    if view.is_conj() or view.is_neg():
        return False
    return all(stride or size < 2 for size, stride in zip(view.shape, view.stride(), strict=True))


def _can_be_written(destination: torch.Tensor) -> bool:
    """Whether plain bytes can be put there; where not, torch does the copy, or says why it cannot be done."""
    return _can_be_read(destination)


def _all_alias(result: Any, base: torch.Tensor) -> bool:
    if isinstance(result, torch.Tensor):
        return bool(torch._C._is_alias_of(result, base))  # type: ignore[attr-defined]  # missing from torch's stubs
    return isinstance(result, (list, tuple)) and all(_all_alias(item, base) for item in result)


def _wrapped(result: Any, source: Source) -> Any:
    if isinstance(result, torch.Tensor):
        return DeferredTensor(source, result)
    return type(result)([_wrapped(item, source) for item in result])


def _same_view(whole: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """What ``meta`` is of the meta tensor, of the plain tensor ``whole``."""
    view = torch.empty(0, dtype=meta.dtype, device="cpu")
    item = whole.itemsize * whole.storage_offset()
    offset = meta.storage_offset() + item // meta.itemsize
    view.set_(whole.untyped_storage(), offset, meta.size(), meta.stride())
    if meta.is_conj():
        view = view.conj()
    return view._neg_view() if meta.is_neg() else view
