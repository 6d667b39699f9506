"""Recording what code does with the deferred tensors of one load, in order.

While a load records, every torch operation of the thread passes through ``interception``. Copies of deferred tensors
become ``pending_copies``, which the engine fetches in the background; deferred tensors that code computes with are made
plain by ``materialising``.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import torch

from modelexpress_core.checkpoint import Checkpoint, TensorInfo
from modelexpress_core.errors import PlacementError
from modelexpress_core.fetch import FetchEngine
from modelexpress_core.placement.coverage import Coverage
from modelexpress_core.placement.deferred import Source
from modelexpress_core.placement.interception import OperationInterceptor, fits_bytewise
from modelexpress_core.placement.materialising import Materialiser
from modelexpress_core.placement.modes import FunctionMode, RecordingMode
from modelexpress_core.placement.pending_copies import PendingCopies
from modelexpress_core.placement.prefetching import prefetch_copies, small_tensors

__all__ = ["Recorder"]

#: The recorders whose blocks this thread is in, outermost first.
_entered = threading.local()


class Recorder:
    """What is recorded and read during one load.

    Args:
        checkpoint: What is loaded.
        engine: Fetches it.
        coverage: Notes every write, if it has to be known which tensors are written.
        fresh: Whether nothing was ever written to the destinations.
    """

    def __init__(
        self, checkpoint: Checkpoint, engine: FetchEngine, coverage: Coverage | None = None, *, fresh: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._lock = threading.RLock()
        self._pending = PendingCopies(engine, coverage, self._lock, fresh=fresh)
        self._materialiser = Materialiser(self._pending, self._lock)
        self._interceptor = OperationInterceptor(self._pending, self._materialiser, self._lock)
        self._mode = RecordingMode(self._interceptor)
        self._functions = FunctionMode(self._interceptor)
        self._sources: dict[str, Source] = {}

    # -- for the loader -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        _settle_outer()
        self._pending.whole_copies_only = False
        small = [self._source(info.name, info) for info in small_tensors(self._checkpoint)]
        if small:
            self._pending.fetch(prefetch_copies(small), urgent=True)
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

    def copy_whole(self, info: TensorInfo, destination: torch.Tensor) -> None:
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
            if fits_bytewise(whole, destination):
                self._pending.record(source, whole, destination)
            else:
                with torch.no_grad():
                    destination.copy_(self._materialiser.materialise(whole, "aten.copy_"))

    def finish(self) -> None:
        """Complete everything that was recorded; deferred tensors cannot be used after this.

        Raises:
            IncompleteLoadError: A copy was recorded and not done although nothing failed.
        """
        with self._lock:
            self._pending.finish()
            self.end()

    def end(self) -> None:
        """Deferred tensors cannot be used after this, and nothing is kept alive for them."""
        with self._lock:
            self._pending.end()
            for source in self._sources.values():
                source.prefetched = source.prefetch = None

    def settle_all(self) -> None:
        """Complete all copies."""
        with self._lock:
            self._pending.settle_all()

    def _source(self, name: str, info: TensorInfo) -> Source:
        source = self._sources.get(name)
        if source is None:
            source = self._sources[name] = Source(info, self._interceptor)
        return source

    # -- figures for the report ---------------------------------------------------------------------------------------

    @property
    def needed_bytes(self) -> int:
        """Bytes of all elements that were asked for, each counted once per use."""
        return self._pending.needed_bytes

    @property
    def materialised_bytes(self) -> int:
        """Bytes turned into plain tensors."""
        return self._materialiser.bytes

    @property
    def materialised_operations(self) -> Counter[str]:
        """Operations that turned bytes into plain tensors, and how often."""
        return self._materialiser.operations

    @property
    def meta_destinations(self) -> int:
        """Copies onto the meta device, for which nothing was read."""
        return self._interceptor.meta_destinations

    @property
    def tensors_used(self) -> int:
        """Tensors of the checkpoint of which anything was copied or read."""
        return sum(source.used for source in self._sources.values())

    @property
    def files_used(self) -> int:
        """Files of these tensors."""
        return len({source.info.file for source in self._sources.values() if source.used})


def _outer() -> list[Recorder]:
    recorders: list[Recorder] = getattr(_entered, "recorders", [])
    return recorders


def _settle_outer() -> None:
    """Complete the copies of the loads whose blocks this thread is in: order is not kept across loads."""
    for recorder in _outer():
        recorder.settle_all()
