"""A load from the memory of a worker that holds the same tensors in the same layout."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer
from modelexpress_core.contracts.transport import ChannelSession, PeerAccess, PeerSession, TensorLayout
from modelexpress_core.errors import BackendError, InvalidURIError, NotFoundError, PlacementError, UnsupportedError
from modelexpress_core.events import LoadProgress
from modelexpress_core.loads.context import LoadContext
from modelexpress_core.loads.destination import Destination
from modelexpress_core.loads.load import Load, peak_rss_bytes
from modelexpress_core.loads.peer_reading import ChunkRead, PeerReader
from modelexpress_core.messages import listed
from modelexpress_core.plugins import TRANSPORT
from modelexpress_core.report import LoadReport
from modelexpress_core.settings import from_env
from modelexpress_core.sources.metrics import source_metrics
from modelexpress_core.sources.settings import DiscoverySettings
from modelexpress_core.sources.worker_client import Description, WorkerClient
from modelexpress_core.transport.layouts import tensor_layouts
from modelexpress_core.uri import ModelURI

if TYPE_CHECKING:
    import torch

    from modelexpress_core.transport.tensor_bytes import TensorBytes

__all__ = ["PeerLoad"]

_COMPARE = "compare the tensors"

#: What a description of a tensor may have beyond the texts and numbers in it.
_DESCRIPTION_BYTES = 256


class PeerLoad(Load):
    """Tensors are compared, leased and read into place, their digests verified, and the lease confirmed by the worker.

    Args:
        candidate: The worker.
        context: Settings and plugins.
        destination: A destination with run-time tensors.
        request: The request; the worker must hold its identity.
    """

    def __init__(
        self, candidate: Candidate, context: LoadContext, destination: Destination, request: LoadRequest
    ) -> None:
        super().__init__(candidate, context, destination)
        self._peer = candidate.peer or _peer_named_by(candidate.uri, request)
        identity = request.identity
        same = identity is not None and identity.source_id == self._peer.source_id
        self._content_version = identity.content_version if identity and same else ""
        self._selector = from_env(DiscoverySettings, context.environ).selector
        self._leasing = contextlib.ExitStack()
        self._worker: WorkerClient
        self._lease_id = ""
        self._session: PeerSession | None = None
        self._reader: PeerReader | None = None
        self._with_gaps: list[tuple[TensorBytes, torch.Tensor]] = []
        self._chunks: list[ChunkRead] = []
        self._tensors = 0
        self._planned_bytes = 0

    def open(self) -> None:
        """Compare the layouts of both sides, lease the memory of the worker, and connect."""
        tensors = self.destination.run_time_tensors()
        if tensors is None:
            reason = "the destination takes tensors of a checkpoint, but a worker holds those of an engine"
            raise UnsupportedError(reason, uri=str(self._uri), operation=_COMPARE)
        self._registered, transport = self._plugins.open(TRANSPORT, self._uri, self._context.environ)
        self._closing.callback(transport.close)
        self._worker = self._closing.enter_context(
            WorkerClient.from_env(self._context.environ, url=_endpoint(self._uri), server=self._peer.server)
        )
        own = sorted(tensor_layouts(tensors))
        try:
            described = self._worker.describe(
                self._peer.source_id,
                self._peer.worker_id,
                most_tensors=len(own),
                most_bytes=_most_bytes(own, tensors),
            )
        except BackendError as exc:
            exc.uri = str(self._uri)
            raise
        self._compare(own, described)
        self._plan(own, tensors, described)
        self._closing.push(self._leasing)
        lease = self._leasing.enter_context(self._worker.lease(self._peer.source_id, self._peer.worker_id or None))
        self._lease_id = lease.lease_id
        access = PeerAccess(
            attrs.evolve(self._peer, worker_id=lease.manifest.worker_id),
            lease.lease_id,
            self._worker.access(lease.lease_id, self._uri.scheme),
            digests_compared=self._context.settings.verify_digests,
        )
        session = transport.connect(access)
        self._session = session
        self._reader = PeerReader(
            session,
            uri=str(self._uri),
            provider=self._registered.provider.name,
            stall_seconds=self._context.settings.stall_seconds,
            verify=self._context.settings.verify_digests,
            on_arrival=self._progress.arrived,
        )
        self._closing.callback(self._reader.close)
        self._planning_done = True
        self._announce(
            provider=self._registered.provider.name, files=0, tensors=len(own), size_bytes=self._planned_bytes
        )

    def _compare(self, own: Sequence[TensorLayout], described: Sequence[Description]) -> None:
        theirs = {each.layout.name: each.layout.canonical for each in described}
        ours = {layout.name: layout.canonical for layout in own}
        if ours == theirs and len(described) == len(own):
            return
        differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        raise NotFoundError(
            f"the worker holds {len(differing)} tensors in another layout, or not at all: {listed(differing)}",
            uri=str(self._uri),
            operation=_COMPARE,
            provider=self._registered.provider.name,
            cause="it runs another model, or another version of the engine",
            hint="compare the identities of both workers",
        )

    def _plan(
        self, own: Sequence[TensorLayout], tensors: Mapping[str, torch.Tensor], described: Sequence[Description]
    ) -> None:
        """Cut each tensor into chunks. Tied tensors share memory, and are read once."""
        import torch

        from modelexpress_core.transport.chunk_digests import CHUNK_BYTES, chunk_count
        from modelexpress_core.transport.tensor_bytes import bytes_of

        digests = {each.layout.name: each.digests for each in described}
        for layout in own:
            try:
                place = bytes_of(layout.name, tensors[layout.name])
            except PlacementError as exc:  # a checkpoint may be copied to it all the same
                raise UnsupportedError(exc.message, uri=str(self._uri), operation=_COMPARE, hint=exc.hint) from exc
            expected = 0 if layout.same_memory_as else chunk_count(place.nbytes)
            if len(digests[layout.name]) != expected:
                reason = f"the worker gives {len(digests[layout.name])} digests of {layout.name}, not {expected}"
                raise NotFoundError(reason, uri=str(self._uri), operation=_COMPARE, peer_at_fault=True)
            if not expected:
                continue
            self._tensors += 1
            self._planned_bytes += place.nbytes
            memory = place.memory
            if memory is None:
                memory = torch.empty(place.nbytes, dtype=torch.uint8, device=tensors[layout.name].device)
                self._with_gaps.append((place, memory))
            for number, digest in enumerate(digests[layout.name]):
                start = number * CHUNK_BYTES
                self._chunks.append(ChunkRead(layout.name, start, memory[start : start + CHUNK_BYTES], digest))

    def fetch(self) -> None:
        """Read every tensor into place; afterwards the worker confirms that its memory did not change."""
        assert self._reader is not None  # noqa: S101 - for the type checker: the load is open
        self.destination.touch()
        self._worker.renew(self._lease_id)  # it is alive, right before the first read
        self._reader.read(self._chunks)
        for place, staged in self._with_gaps:
            place.scatter(staged)
        self._leasing.close()  # raises unless the lease lasted until now

    def complete(self) -> LoadReport:
        """Complete the load, and count it."""
        report = super().complete()
        self._count("")
        return report

    def abort(self, exc: BaseException) -> None:
        """Abort the load, and count it."""
        self._count(type(exc).__name__)
        super().abort(exc)

    def _count(self, error: str) -> None:
        reader = self._reader
        source_metrics().transferred(
            self._selector,
            self._uri.scheme,
            error=error,
            seconds=time.monotonic() - self._begun,
            read_bytes=0 if reader is None else reader.arrived_bytes + reader.reread_bytes,
            mismatches=0 if reader is None else reader.mismatches,
        )

    def _stop(self, exc: BaseException) -> bool:
        stopped = self._reader is None or self._reader.close()
        with contextlib.suppress(BackendError):
            self._leasing.__exit__(type(exc), exc, exc.__traceback__)
        return stopped

    def _progress_event(self) -> LoadProgress:
        seconds = time.monotonic() - self._begun
        arrived = 0 if self._reader is None else self._reader.arrived_bytes
        rate = arrived / seconds if seconds else 0.0
        return LoadProgress(
            load_id=self._id,
            uri=str(self._uri),
            bytes_done=arrived,
            bytes_planned=self._planned_bytes,
            planning_done=self._planning_done,
            seconds=seconds,
            bytes_per_second=rate,
            eta_seconds=(self._planned_bytes - arrived) / rate if rate else None,
            retries=0 if self._reader is None else self._reader.read_again,
        )

    def _account(self) -> LoadReport:
        assert self._reader is not None  # noqa: S101 - as above
        ended = time.monotonic()
        reader = self._reader
        return LoadReport(
            uri=str(self._uri),
            storage={"plugin": self._registered.plugin.name, "version": self._registered.plugin.version},
            tensors=self._tensors,
            tensors_in_checkpoint=0,
            files=0,
            bytes_needed=self._planned_bytes,
            bytes_fetched=reader.arrived_bytes,
            bytes_reread=reader.reread_bytes,
            bytes_materialised=0,
            header_bytes=0,
            seconds=ended - self._begun,
            phase_seconds={"open": self._opened - self._begun, "load": ended - self._opened},
            goodput_bytes_per_second=self._planned_bytes / (ended - self._begun),
            requests=len(self._chunks) + reader.read_again,
            retries=reader.read_again,
            concurrency=reader.threads,
            verified={
                "versions": 0,
                "sizes": 0,
                "digests": len(self._chunks) if self._context.settings.verify_digests else 0,
            },
            materialised_operations={},
            meta_destinations=0,
            peak_rss_bytes=peak_rss_bytes(),
            content_version=self._content_version,
            channel=self._session.channel if isinstance(self._session, ChannelSession) else "",
        )


def _peer_named_by(uri: ModelURI, request: LoadRequest) -> Peer:
    """Return the peer that a URI names: ``<transport>://<endpoint>/<source id>/<worker id>``."""
    source_id, _, worker_id = uri.path.partition("/")
    if not source_id:
        if request.identity is None:
            message = f"{uri} does not name the source and the worker to read"
            raise InvalidURIError(
                message, hint="write <transport>://<host>:<port>/<source id>/<worker id>; `mx sources` shows both"
            )
        source_id = request.identity.source_id
    return Peer(source_id=source_id, worker_id=worker_id, worker_rank=request.worker_rank)


def _endpoint(uri: ModelURI) -> str:
    scheme = "https" if uri.query.get("tls") == "1" else "http"
    return f"{scheme}://{uri.authority}"


def _most_bytes(own: Sequence[TensorLayout], tensors: Mapping[str, torch.Tensor]) -> int:
    """Return how many bytes the descriptions of a worker with the same layout can have."""
    from modelexpress_core.transport.chunk_digests import chunk_count

    def texts(layout: TensorLayout) -> int:
        return 4 * (len(layout.name) + len(layout.same_memory_as)) + 20 * len(layout.shape)

    return sum(_DESCRIPTION_BYTES + texts(layout) + 8 * chunk_count(tensors[layout.name].nbytes) for layout in own)
