"""Recording what code does with deferred tensors, and keeping the order in which it does it.

While a load records, every torch operation of the thread passes through here. Three things can happen to it:

- it looks at a deferred tensor anew (``narrow``, ``view``, ``t``): the meta tensor is looked at, nothing is read;
- it copies a deferred tensor to a place: the copy is recorded and fetched in the background;
- it is anything else: what it reads or writes is made real first. Deferred tensors among its arguments are read,
  and copies to memory that it touches are completed. Correctness does not depend on knowing the operation.

What loading does to every weight has shortcuts, which end in the same.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from modelexpress_core.checkpoint import Checkpoint, TensorInfo
from modelexpress_core.errors import IncompleteLoadError, PlacementError
from modelexpress_core.fetch import FetchEngine
from modelexpress_core.placement.coverage import Coverage
from modelexpress_core.placement.deferred import DeferredTensor, Source, Unwatched, deferred_view
from modelexpress_core.placement.memory import PendingMemory, has_memory, pinned_memory, region_of
from modelexpress_core.placement.operations import Operation, operation
from modelexpress_core.placement.plan import Copy, ReadPlanner
from modelexpress_core.placement.shortcuts import SHORTCUTS

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

#: Completed copies, which keep their destinations alive, are forgotten when this many or this much is kept ...
_PURGE_COPIES = 1024
_PURGE_BYTES = 256 << 20
#: ... or this many times what was left the last time, so that looking through what is still on its way stays cheap.
_PURGE_GROWTH = 2

#: Ways from a tensor to its whole storage, which other tensors may share, that are no operations.
_STORAGE_ESCAPES = frozenset(
    {
        torch.Tensor.__deepcopy__,
        torch.Tensor.share_memory_,
        torch.Tensor.storage,
        torch.Tensor.untyped_storage,
    }
)
#: ``tensor.data = other``, which would give a tensor the memory that a deferred one does not have.
_SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]  # the stubs show its value's type
#: All ways from a tensor to memory that are no operations.
_ESCAPES = _STORAGE_ESCAPES | {
    _SET_DATA,
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

_modes = torch._C._len_torch_dispatch_stack
_switched_off = torch._C._dispatch_tls_is_dispatch_key_excluded
_MODES = torch._C.DispatchKey.Python
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_AS_STRIDED = torch.ops.aten.as_strided.default
_COPY = torch.ops.aten.copy_.default

#: The recorders whose blocks this thread is in, outermost first.
_entered = threading.local()


class Recorder:
    """What is recorded and read during one load.

    Args:
        checkpoint: What is loaded.
        engine: Fetches it.
        coverage: Told of every write, where it matters which tensors are written.
        fresh: Whether nothing was ever written to the destinations.
    """

    def __init__(
        self, checkpoint: Checkpoint, engine: FetchEngine, coverage: Coverage | None = None, *, fresh: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._engine = engine
        cost, runs = engine.capabilities.request_cost_bytes, engine.capabilities.read_runs
        staged = engine.force_staging
        self._planner = ReadPlanner(engine.chunk_bytes, cost, reads_runs=runs, force_staging=staged)
        self._coverage = coverage
        self._fresh = fresh
        self._lock = threading.RLock()
        self._mode = _RecordingMode(self)
        self._functions = _FunctionMode(self)
        self._recorded: deque[tuple[Source, torch.Tensor, torch.Tensor]] = deque()
        self._placing = False
        self._pending: PendingMemory[Copy] = PendingMemory()
        self._unsubmitted: list[Copy] = []
        self._unsubmitted_bytes = 0
        self._pending_bytes = 0
        self._purge_copies = _PURGE_COPIES
        self._purge_bytes = _PURGE_BYTES
        self._fault: BaseException | None = None
        self._placed_only = True
        self._pinned = False
        self._ended = False
        self._sources: dict[str, Source] = {}
        self.needed_bytes = 0
        self.materialised_bytes = 0
        self.materialised_operations: Counter[str] = Counter()
        self.meta_destinations = 0

    # -- for the loader -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        _settle_outer()
        self._placed_only = False
        self._prefetch()
        self._functions.__enter__()
        self._mode.__enter__()
        _entered.recorders = [*_outer(), self]
        return self

    def __exit__(self, *exc: object) -> None:
        _entered.recorders = [recorder for recorder in _outer() if recorder is not self]
        self._mode.__exit__(None, None, None)
        self._functions.__exit__(None, None, None)

    def deferred(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the checkpoint, deferred, in the order of files and of bytes in them."""
        for name, info in self._checkpoint.tensors.items():
            yield name, self._source(name, info).whole()

    def place(self, info: TensorInfo, destination: torch.Tensor) -> None:
        """Copy the whole of the stored tensor ``info`` to ``destination``, which has its shape.

        Raises:
            PlacementError: ``destination`` has no memory.
        """
        if destination.device.type == "meta":
            message = f"the destination of {info.name} is on the meta device, which has no memory"
            raise PlacementError(
                message, tensor=info.name, hint="allocate it with torch.empty_like(tensor, device=...)"
            )
        source = self._source(info.name, info)
        _settle_outer()
        with self._lock:
            source.used = True
            whole = source.whole()
            if _fits_bytewise(whole, destination):
                self._record(source, whole, destination)
            else:
                with torch.no_grad():
                    destination.copy_(self.materialise(whole, "aten.copy_"))

    def finish(self) -> None:
        """Complete everything that was recorded; deferred tensors cannot be used any more.

        Raises:
            IncompleteLoadError: A copy was recorded and not done although nothing failed.
        """
        with self._lock:
            self._submit()
            self._engine.finish()
            lost = sorted({copy.info.name for copy in self._all_pending() if not copy.done})
            if lost:
                message = f"{len(lost)} tensors were recorded and not fetched: {', '.join(lost[:8])}"
                cause = "an error that ended the recording of other tensors was caught by the code that loads"
                raise IncompleteLoadError(message, missing=lost, cause=cause, hint="let that error pass")
            self.end()

    def end(self) -> None:
        """Deferred tensors cannot be used any more, and nothing is kept alive for them."""
        with self._lock:
            self._ended = True
            self._pending = PendingMemory()
            self._unsubmitted = []
            self._recorded.clear()
            for source in self._sources.values():
                source.prefetched = source.prefetch = None

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
        if what.composite and any(isinstance(value, DeferredTensor) for value in args):
            # Inference mode has not taken it apart on the way here, and on the meta device it may not do the same.
            with _RecordingMode(self):
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        if what.view:
            return self._view(func, what, args, kwargs)
        with self._lock:
            return self._compute(func, what, args, kwargs)

    def dispatch_elsewhere(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do ``func`` where no mode watches: other operations cannot be ordered after it, so it is completed."""
        result = self.dispatch(func, args, kwargs)
        self.settle_all()
        return result

    def escaping(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of ``func``, which hands out memory past dispatch, with what belongs there in it."""
        with self._lock:
            if func == _SET_DATA:
                return self._setting_data(*args)
            if func in _STORAGE_ESCAPES:
                self._complete(self._all_pending())
            args = tuple(_shared(value) for value in args)
            for value in args:
                if isinstance(value, torch.Tensor):
                    self._settle(value)
            return args

    def _setting_data(self, tensor: torch.Tensor, data: Any) -> tuple[Any, ...]:
        if isinstance(tensor, DeferredTensor):
            message = f"{tensor!r} cannot be given other data"
            raise PlacementError(message, tensor=tensor._source.info.name, hint="make a tensor of the data instead")
        if isinstance(data, DeferredTensor):
            data = _shared(data)
            self._wrote(tensor)
        return tensor, data

    def settle_all(self) -> None:
        """Complete all copies."""
        with self._lock:
            self._complete(self._all_pending())

    def _copy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        destination: torch.Tensor = args[0]
        deferred: DeferredTensor = args[1]
        source = deferred._source
        if source.real is None and source.recorder is self and has_memory(destination):
            shape = destination.shape
            view = deferred if deferred.shape == shape else deferred._meta.expand(shape)
            source.used = True
            if destination.device.type == "meta":
                self.meta_destinations += 1
                return destination
            if _fits_bytewise(view, destination):
                self._copy_bytes(source, view, deferred.nbytes, destination)
                return destination
        return self._compute(_COPY, operation(_COPY), args, kwargs)

    def _view(self, func: Any, what: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args else None
        if isinstance(first, DeferredTensor):
            source = first._source
            if what.value_view:
                source.recorder.shared_memory(first)
            if source.real is None:
                plain = [a._meta if isinstance(a, DeferredTensor) else a for a in args]
                result = func(*plain, **kwargs)
                if func is _AS_STRIDED:
                    _check_bounds(result, source)
                if _all_alias(result, first._meta):
                    return _wrapped(result, source)
            with self._lock:
                return self._compute(func, what, args, kwargs)
        if isinstance(first, torch.Tensor) and not any(isinstance(a, DeferredTensor) for a in args[1:]):
            result = func(*args, **kwargs)
            if not (self._recorded or len(self._pending)) or _all_alias(result, first):
                return result
        # It copied instead: do it again, with what it reads in place.
        with self._lock:
            return self._compute(func, what, args, kwargs)

    def _compute(self, func: Any, what: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if what.shape_only:
            return self._shape_only(func, args, kwargs)
        if what.reshapes_in_place:  # may move the storage, which other tensors share
            self._complete(self._all_pending())
        for name in what.written_names & kwargs.keys():  # before others, which may be views of the same tensor
            self._made_real(kwargs[name], what, written=True)
        new_args = tuple(self._made_real(value, what, position in what.written) for position, value in enumerate(args))
        new_kwargs = {key: self._made_real(value, what, key in what.written_names) for key, value in kwargs.items()}
        result = func(*new_args, **new_kwargs)
        for position in what.written:
            if position < len(new_args):
                self._was_written(args[position], new_args[position], what)
        for name in what.written_names:
            if name in kwargs:
                self._was_written(kwargs[name], new_kwargs[name], what)
        return result

    def _was_written(self, value: Any, made: Any, what: Operation) -> None:
        if isinstance(value, (list, tuple)):
            for item, made_item in zip(value, made, strict=True):
                self._was_written(item, made_item, what)
        elif isinstance(value, DeferredTensor):
            if value.shape != made.shape:
                raise _reshaped(what, value)
        elif isinstance(value, torch.Tensor) and not what.reshapes_in_place:
            self._wrote(value)

    def _made_real(self, value: Any, what: Operation, written: bool) -> Any:
        if isinstance(value, DeferredTensor):
            source = value._source
            if written and what.reshapes_in_place:
                raise _reshaped(what, value)
            if written or what.reshapes_in_place or source.real is not None:
                value = _shared(value)
            else:
                plain = source.recorder.materialise(value, what.name)
                # An operation that may return its very input must not return what we keep for the next reader.
                return plain.clone() if what.view else plain
        if isinstance(value, torch.Tensor):
            self._settle(value)
            return value
        if isinstance(value, (list, tuple)):
            return type(value)([self._made_real(item, what, written) for item in value])
        return value

    def _shape_only(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(args[0], DeferredTensor):
            return func(*args, **kwargs)
        kwargs = dict(kwargs)
        if kwargs.get("device") is None:
            kwargs["device"] = torch.device("cpu")
        return func(args[0]._meta, *args[1:], **kwargs)

    # -- copies -------------------------------------------------------------------------------------------------------

    def copied(self, deferred: DeferredTensor, destination: torch.Tensor) -> None:
        """Code copied ``deferred`` to ``destination``, bytes to bytes."""
        if deferred._source.prefetched is None:
            self._record(deferred._source, deferred, destination)
        else:
            with self._lock:
                self._copy_bytes(deferred._source, deferred, deferred.nbytes, destination)

    def _copy_bytes(self, source: Source, view: torch.Tensor, needed: int, destination: torch.Tensor) -> None:
        """Copy ``view``: now, where its bytes are here already, or else in the background."""
        source.used = True
        if source.prefetched is None:
            self._record(source, view, destination)
            return
        self.needed_bytes += needed
        self._settle(destination)
        destination.copy_(self._prefetched_view(source, view))
        self._wrote(destination)

    def _record(self, source: Source, view: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy ``view`` to ``destination`` in the background.

        It is only noted here. What follows from it takes less time when it is done for many copies together; and it is
        done before anything else asks what is on its way.
        """
        if self._ended:
            self._check_usable(source.info)
        # The memory as it is now: the tensor itself may be given other memory before this is planned or done.
        if type(destination) is torch.Tensor:
            memory = destination.detach()
        else:
            with torch._C.DisableTorchFunction():
                memory = destination.detach()
        self._recorded.append((source, view, memory))
        self._unsubmitted_bytes += view.nbytes
        if self._unsubmitted_bytes >= _BATCH_BYTES or len(self._recorded) + len(self._unsubmitted) >= _BATCH_COPIES:
            with self._lock:
                self._submit()

    def _place_recorded(self) -> None:
        """Find out which memory the copies go to that were recorded, after those that went there before."""
        if not self._recorded or self._placing:
            return
        if self._fault is not None:
            raise self._fault
        self._placing = True
        try:
            # What is recorded meanwhile comes after all of these.
            recorded = [self._recorded.popleft() for _ in range(len(self._recorded))]
            for source, view, memory in recorded:
                self._place(source, view, memory)
        except BaseException as exc:
            self._fault = exc  # none of the rest will be done, whoever catches this
            raise
        finally:
            self._placing = False
        if self._placed_only:  # destinations live as long as the load, and whether they overlap has to be known
            return
        if len(self._pending) >= self._purge_copies or self._pending_bytes >= self._purge_bytes:
            self._purge()

    def _place(self, source: Source, view: torch.Tensor, memory: torch.Tensor) -> None:
        source.used = True
        region = region_of(memory)
        if region is None:
            return
        if memory.is_cuda and not self._pinned:
            self._pinned = True
            self._engine.staging.allocate_with(pinned_memory)
        pending = self._pending
        earlier = pending.overlapping(region) if len(pending) else ()
        copy = Copy(source.info, view, memory)
        copy.stable = self._placed_only and not earlier
        copy.fresh = self._fresh
        if earlier:
            self._complete(earlier)
            for overwritten in earlier:
                overwritten.stable = False
        self.needed_bytes += copy.needed_bytes
        self._pending_bytes += copy.needed_bytes
        pending.add(region, copy)
        self._unsubmitted.append(copy)
        if self._coverage is not None:
            self._coverage.wrote_region(region)

    def _purge(self) -> None:
        """Forget the copies that are done."""
        self._pending.purge()
        self._pending_bytes = sum(copy.needed_bytes for copy in self._pending.owners())
        self._purge_copies = max(_PURGE_COPIES, _PURGE_GROWTH * len(self._pending))
        self._purge_bytes = max(_PURGE_BYTES, _PURGE_GROWTH * self._pending_bytes)

    def _all_pending(self) -> list[Copy]:
        """All copies that were recorded, but for some that are done, in order."""
        self._place_recorded()
        return self._pending.owners()

    def _submit(self, *, urgent: bool = False) -> None:
        self._place_recorded()
        copies, self._unsubmitted, self._unsubmitted_bytes = self._unsubmitted, [], 0
        self._fetch(copies, urgent=urgent)

    def _fetch(self, copies: Sequence[Copy], *, urgent: bool) -> None:
        if self._fault is not None:
            raise self._fault
        if not copies:
            return
        try:
            with Unwatched():
                self._engine.submit(self._planner.batches(copies), urgent=urgent)
        except BaseException as exc:
            self._fault = exc  # none of these copies will be done, whoever catches this
            raise

    def _complete(self, copies: Iterable[Copy]) -> None:
        waiting = [copy for copy in copies if not copy.done]
        if waiting:
            self._submit(urgent=True)
            self._engine.wait(waiting)

    def _settle(self, tensor: torch.Tensor) -> None:
        """Complete the copies to memory of ``tensor``."""
        if tensor.device.type == "meta":
            return
        self._place_recorded()
        if not len(self._pending):
            return
        region = region_of(tensor) if has_memory(tensor) else None
        if region is not None:
            self._complete(self._pending.overlapping(region))
        elif not has_memory(tensor):  # we cannot tell which memory it stands for
            self._complete(self._all_pending())

    def _wrote(self, tensor: torch.Tensor) -> None:
        if self._coverage is not None:
            self._coverage.wrote(tensor)

    # -- real tensors -------------------------------------------------------------------------------------------------

    def materialise(self, deferred: DeferredTensor, reason: str) -> torch.Tensor:
        """A plain tensor with the elements of ``deferred``; ``reason`` is counted in the report."""
        with self._lock, torch.inference_mode(mode=False), Unwatched():
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
        if not _plain_bytes(meta):
            strides = meta.stride()
            once = [size if stride else min(size, 1) for size, stride in zip(meta.shape, strides, strict=True)]
            return self._fetched(source, meta.as_strided(once, strides)).expand(meta.shape).clone()
        return self._fetched(source, meta)

    def _fetched(self, source: Source, meta: torch.Tensor) -> torch.Tensor:
        """A new plain tensor with the elements of ``meta``, with the strides that a clone would have."""
        real = torch.empty_strided(meta.size(), torch.empty_like(meta).stride(), dtype=meta.dtype, device="cpu")
        if meta.numel():
            copy = Copy(source.info, meta, real)
            self.needed_bytes += copy.needed_bytes
            self._submit()  # what waits to be fetched is fetched meanwhile
            self._fetch([copy], urgent=True)
            self._engine.wait([copy])
        return real

    def shared_memory(self, deferred: DeferredTensor) -> torch.Tensor:
        """The memory that every view of the stored tensor means, from now on, because it may be written to."""
        with self._lock, torch.inference_mode(mode=False), Unwatched():
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
        return _same_view(source.prefetched.view(source.dtype), meta)

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
        self._fetch(copies, urgent=True)

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


class _FunctionMode(TorchFunctionMode):
    """Takes shortcuts, and completes copies to a tensor before its memory is handed out past dispatch."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shortcut = SHORTCUTS.get(func)
        if shortcut is not None:
            # If other modes of dispatch want to see what is done, or modes are switched off, it goes the long way.
            if not kwargs and _modes() == 1 and not _switched_off(_MODES):
                result = shortcut(self._recorder, args)
                if result is not NotImplemented:
                    return result
        elif func in _ESCAPES:
            args = self._recorder.escaping(func, args)
        return func(*args, **(kwargs or {}))


def _shared(value: Any) -> Any:
    """``value``, with memory if it is deferred."""
    return value._source.recorder.shared_memory(value) if isinstance(value, DeferredTensor) else value


def _outer() -> list[Recorder]:
    recorders: list[Recorder] = getattr(_entered, "recorders", [])
    return recorders


def _settle_outer() -> None:
    """Complete the copies of the loads that this one begins inside of: their order is not kept across loads."""
    for recorder in _outer():
        recorder.settle_all()


def _plain_bytes(tensor: torch.Tensor) -> bool:
    """Whether the bytes of the tensor are its values, each element once."""
    if tensor.is_conj() or tensor.is_neg():
        return False
    strides = tensor.stride()
    return 0 not in strides or all(stride or size < 2 for size, stride in zip(tensor.shape, strides, strict=True))


def _fits_bytewise(view: torch.Tensor, destination: torch.Tensor) -> bool:
    """Whether the copy is one of plain bytes and casts; where not, torch does it, or says why it cannot be done."""
    if not has_memory(destination) or not _plain_bytes(view) or not _plain_bytes(destination):
        return False
    return not view.is_complex() or destination.is_complex()  # torch warns of what it drops, which belongs here


def _check_bounds(view: torch.Tensor, source: Source) -> None:
    """What torch checks for tensors with memory, but not for those on the meta device."""
    if not view.numel():
        return
    last = view.storage_offset() + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    if (last + 1) * view.itemsize > source.info.length:
        message = (
            f"setStorage: sizes {list(view.shape)}, strides {list(view.stride())}, storage offset "
            f"{view.storage_offset()} and itemsize {view.itemsize} are out of bounds for the "
            f"{source.info.length} bytes of {source.info.name}"
        )
        raise RuntimeError(message)


def _reshaped(what: Operation, deferred: DeferredTensor) -> PlacementError:
    message = f"{what.name} changes the shape of {deferred!r} in place, which a deferred tensor cannot follow"
    name = deferred._source.info.name
    return PlacementError(message, tensor=name, hint="use the operation that returns a new tensor instead")


def _all_alias(result: Any, base: torch.Tensor) -> bool:
    if isinstance(result, torch.Tensor):
        return bool(torch._C._is_alias_of(result, base))  # type: ignore[attr-defined]  # missing from torch's stubs
    return isinstance(result, (list, tuple)) and all(_all_alias(item, base) for item in result)


def _wrapped(result: Any, source: Source) -> Any:
    if isinstance(result, torch.Tensor):
        layout = tuple(result.size()), result.stride(), int(result.storage_offset())
        return deferred_view(source, layout, result.dtype, result)
    return type(result)([_wrapped(item, source) for item in result])


def _same_view(whole: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """What ``meta`` is of the meta tensor, of the plain tensor ``whole``."""
    view = torch.empty(0, dtype=meta.dtype, device="cpu")
    item = whole.itemsize * whole.storage_offset()
    offset = meta.storage_offset() + item // meta.itemsize
    view.set_(whole.untyped_storage(), offset, meta.size(), meta.stride())
    return view
