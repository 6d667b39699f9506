"""``WorkerService``: gives readers the manifest of a worker's tensors, and leases that keep the memory unchanged.

A reader takes a lease before it reads, and releases it afterwards. A worker drains before it changes or frees its
memory: it grants no more leases, and waits for those that are active.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import attrs
import grpc
import grpc.aio
from attrs import frozen

from modelexpress_core.contracts.authenticator import Authenticator, Call, RefusedError
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.resources import start_thread
from modelexpress_core.sources.metrics import worker_metrics
from modelexpress_core.sources.offered_tensors import OfferedTensors
from modelexpress_core.sources.readers import Readers
from modelexpress_core.wire.admission import MessageLimits
from modelexpress_core.wire.authentication import caller
from modelexpress_core.wire.grants import ANONYMOUS
from modelexpress_core.wire.peers import peer_host
from modelexpress_core.wire.proto.modelexpress import access_pb2, health_pb2, p2p_pb2, peer_pb2
from modelexpress_core.wire.rpc import LEASE, PEER, STANDARD_HEALTH, WORKER, Service, handler
from modelexpress_core.wire.serving import listen, new_server
from modelexpress_core.wire.settings import TlsSettings

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["RENEWAL_SECONDS", "Leases", "TooManyLeasesError", "WorkerServer"]

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Code = grpc.StatusCode
_R = TypeVar("_R")


#: Active leases of one reader, and of all. A reader needs one for each load; leases of readers that died stay for
#: minutes, and many readers may share an address.
_MAX_OF_READER = 128
_MAX_LEASES = 1024

#: Released leases that are remembered for one reader, and for all.
_MAX_RELEASED_OF_READER = 128
_MAX_RELEASED = 4096


class TooManyLeasesError(Exception):
    """A reader, or all readers together, hold as many leases as they may."""


#: A lease that its reader renews ends this long after the last renewal: a reader that died holds up nothing for long.
RENEWAL_SECONDS = 15


@frozen
class _Lease:
    """A lease.

    Attributes:
        reader: Whose it is.
        until: When it expires.
        latest: When it expires even if it is renewed.
    """

    reader: str
    until: float
    latest: float


class Leases:
    """The leases of the current readers. Thread-safe.

    Args:
        seconds: A lease expires after this time, in case its reader has died, also if it is renewed.
        clock: A monotonic clock, in seconds.
        opened: Whether leases are granted from the start; if not, from when ``open`` is called.

    Attributes:
        readers: Who holds them, and what was read under each.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic, *, opened: bool = True) -> None:
        self.readers = Readers(clock)
        self._opened = opened
        self._seconds = seconds
        self._clock = clock
        self._active: dict[str, _Lease] = {}
        #: Released leases, until they would have expired, so that a repeated release gets the same answer.
        self._released: dict[str, _Lease] = {}
        self._active_of: Counter[str] = Counter()
        self._released_of: Counter[str] = Counter()
        self._draining = False
        self._changed = threading.Condition()
        worker_metrics().watch_leases(self)

    @property
    def draining(self) -> bool:
        """Whether the worker has stopped granting leases."""
        return self._draining

    @property
    def refusal(self) -> str:
        """Why no leases are granted now, as a sentence; empty if they are."""
        if self._draining:
            return _DRAINING
        return "" if self._opened else _NOT_READY

    def open(self) -> None:
        """Grant leases from now on, unless it drains."""
        self._opened = True

    def grant(self, reader: str = "", *, renews: bool = False) -> str | None:
        """Return a new lease; None while none is granted.

        Args:
            reader: Name or address of the reader, whose number of leases is limited.
            renews: Whether the reader renews it; it ends ``RENEWAL_SECONDS`` after the last renewal then.

        Raises:
            TooManyLeasesError: The reader, or all readers together, hold as many as they may.
        """
        with self._changed:
            if self.refusal:
                worker_metrics().lease_refused("draining")
                return None
            self._remove_expired()
            if self._active_of[reader] >= _MAX_OF_READER:
                worker_metrics().lease_refused("reader_limit")
                message = f"the reader {reader} holds {_MAX_OF_READER} leases, which is the limit for a reader"
                raise TooManyLeasesError(message)
            if len(self._active) >= _MAX_LEASES:
                worker_metrics().lease_refused("worker_limit")
                message = f"readers hold {_MAX_LEASES} leases, which is the limit for a worker"
                raise TooManyLeasesError(message)
            lease = secrets.token_hex(16)
            now = self._clock()
            latest = now + self._seconds
            self._active[lease] = _Lease(reader, min(latest, now + RENEWAL_SECONDS) if renews else latest, latest)
            self._active_of[reader] += 1
            self.readers.begin(lease, reader)
            return lease

    def release(self, lease: str) -> bool:
        """End a lease; return False if it had expired or never existed, so that its reader cannot trust its data.

        A call that is repeated because its answer was lost gets the same answer.
        """
        with self._changed:
            self._remove_expired()
            active = _pop(self._active, self._active_of, lease)
            if active is not None:
                self.readers.end(lease)
                self._remember(lease, active)
                self._changed.notify_all()
            return lease in self._released

    def renew(self, lease: str) -> bool:
        """Let a lease last for ``RENEWAL_SECONDS`` from now; return False if it has ended or never existed."""
        with self._changed:
            self._remove_expired()
            active = self._active.get(lease)
            if active is not None:
                until = min(active.latest, max(active.until, self._clock() + RENEWAL_SECONDS))
                self._active[lease] = attrs.evolve(active, until=until)
            return active is not None

    def holds(self, lease: str) -> bool:
        """Whether a lease is active."""
        with self._changed:
            active = self._active.get(lease)
            return active is not None and active.until > self._clock()

    def out(self) -> int:
        """Return the number of active leases."""
        with self._changed:
            return self._remove_expired()

    def drain(self, timeout_seconds: float) -> bool:
        """Grant no more leases and wait for the active ones; return whether all were released or expired in time.

        The others end: their readers get an error when they release them.
        """
        deadline = self._clock() + timeout_seconds
        with self._changed:
            self._draining = True
            while self._remove_expired():
                now = self._clock()
                if now >= deadline:
                    for lease in self._active:
                        self.readers.end(lease)
                    self._active.clear()
                    self._active_of.clear()
                    return False
                # A lease may be renewed meanwhile: the loop looks again.
                self._changed.wait(min(deadline, *(lease.until for lease in self._active.values())) - now)
            return True

    def _remember(self, lease: str, released: _Lease) -> None:
        """Note a released lease. Each reader has room for some; what is forgotten is answered as if it had expired."""
        reader = released.reader
        if self._released_of[reader] >= _MAX_RELEASED_OF_READER:
            oldest = next(each for each, known in self._released.items() if known.reader == reader)
            _pop(self._released, self._released_of, oldest)
        elif len(self._released) >= _MAX_RELEASED:
            _pop(self._released, self._released_of, next(iter(self._released)))
        self._released[lease] = released
        self._released_of[reader] += 1

    def _remove_expired(self) -> int:
        """Forget expired leases; return the number of active ones."""
        now = self._clock()
        for lease in [each for each, active in self._active.items() if active.until <= now]:
            _pop(self._active, self._active_of, lease)
            self.readers.end(lease)
        for lease in [each for each, released in self._released.items() if released.latest <= now]:
            _pop(self._released, self._released_of, lease)
        return len(self._active)


def _pop(leases: dict[str, _Lease], of_reader: Counter[str], lease: str) -> _Lease | None:
    """Remove a lease, and count it no longer; None if there is no such lease."""
    known = leases.pop(lease, None)
    if known is not None:
        of_reader[known.reader] -= 1
        if not of_reader[known.reader]:
            del of_reader[known.reader]
    return known


class _WorkerService:
    """The handlers of ``WorkerService``."""

    def __init__(self, manifest: p2p_pb2.GetTensorManifestResponse, leases: Leases) -> None:
        self._manifest = manifest
        self._leases = leases

    async def get_tensor_manifest(
        self, request: p2p_pb2.GetTensorManifestRequest, context: _Context
    ) -> p2p_pb2.GetTensorManifestResponse:
        """Return the manifest."""
        await self._check(request, context)
        return self._manifest

    async def prepare_tensor_read(
        self, request: p2p_pb2.PrepareTensorReadRequest, context: _Context
    ) -> p2p_pb2.PrepareTensorReadResponse:
        """Grant a lease, and return it with the manifest."""
        await self._check(request, context)
        name, host = caller.get(), peer_host(context.peer())
        try:
            reader = host if name in {"", ANONYMOUS} else f"{name} at {host}"
            lease = self._leases.grant(reader, renews=request.renews)
        except TooManyLeasesError as exc:
            await context.abort(_Code.RESOURCE_EXHAUSTED, f"{exc}; release leases, or read from another worker")
        if lease is None:
            await context.abort(_Code.UNAVAILABLE, _DRAINING)
        return p2p_pb2.PrepareTensorReadResponse(
            lease_id=lease, manifest=self._manifest, renew_within_seconds=RENEWAL_SECONDS if request.renews else 0
        )

    async def release_tensor_read(
        self, request: p2p_pb2.ReleaseTensorReadRequest, context: _Context
    ) -> p2p_pb2.ReleaseTensorReadResponse:
        """Release a lease, also while the worker drains."""
        await self._check_ids(request, context)
        self._leases.readers.told(request.lease_id, request.read_bytes)
        if not self._leases.release(request.lease_id):
            await context.abort(_Code.NOT_FOUND, _NO_LEASE)
        return p2p_pb2.ReleaseTensorReadResponse()

    async def _check(self, request: Any, context: _Context) -> None:  # noqa: ANN401 - one of two messages
        await self._check_ids(request, context)
        if self._leases.refusal:
            await context.abort(_Code.UNAVAILABLE, self._leases.refusal)

    async def _check_ids(self, request: Any, context: _Context) -> None:  # noqa: ANN401 - one of three messages
        worker_id = request.worker_id if request.HasField("worker_id") else None
        await _check_ids(self._manifest, request.mx_source_id, worker_id, context)


class _LeaseService:
    """The handlers of ``LeaseService``."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    async def renew_lease(
        self, request: access_pb2.RenewLeaseRequest, context: _Context
    ) -> access_pb2.RenewLeaseResponse:
        """Renew a lease, also while the worker drains."""
        if not self._leases.renew(request.lease_id):
            await context.abort(_Code.NOT_FOUND, _NO_LEASE)
        self._leases.readers.told(request.lease_id, request.read_bytes)
        return access_pb2.RenewLeaseResponse()


class _PeerService:
    """The handlers of ``PeerService``.

    Args:
        manifest: Has the ids of source and worker.
        leases: The leases of the readers.
        offered: The tensors.
        descriptions: What each transport tells readers, by scheme.
    """

    def __init__(
        self,
        manifest: p2p_pb2.GetTensorManifestResponse,
        leases: Leases,
        offered: OfferedTensors,
        descriptions: Mapping[str, bytes],
    ) -> None:
        self._manifest = manifest
        self._leases = leases
        self._offered = offered
        self._descriptions = descriptions

    async def describe_tensors(
        self, request: peer_pb2.DescribeTensorsRequest, context: _Context
    ) -> peer_pb2.DescribeTensorsResponse:
        """Return a page of layouts and digests."""
        await _check_ids(self._manifest, request.mx_source_id, request.worker_id or None, context)
        if self._leases.refusal:
            await context.abort(_Code.UNAVAILABLE, self._leases.refusal)
        if not self._offered.digested:
            await context.abort(_Code.UNAVAILABLE, "the worker has not yet taken the digests of its tensors")
        return self._offered.page(request.first)

    async def get_access(self, request: peer_pb2.GetAccessRequest, context: _Context) -> peer_pb2.GetAccessResponse:
        """Return what a transport tells readers, to one that holds a lease."""
        if not self._leases.holds(request.lease_id):
            await context.abort(_Code.NOT_FOUND, _NO_LEASE)
        description = self._descriptions.get(request.transport)
        if description is None:
            offered = ", ".join(self._descriptions) or "none"
            reason = f"this worker does not offer its tensors over {request.transport!r}, but over {offered}"
            await context.abort(_Code.FAILED_PRECONDITION, reason)
        self._leases.readers.connected(request.lease_id, request.transport)
        return peer_pb2.GetAccessResponse(description=description)

    async def list_readers(
        self, request: peer_pb2.ListReadersRequest, context: _Context
    ) -> peer_pb2.ListReadersResponse:
        """Return who reads, to callers that may read; also while the worker drains, which waits for them."""
        await _check_ids(self._manifest, request.mx_source_id, request.worker_id or None, context)
        readers = self._leases.readers.listed()
        return peer_pb2.ListReadersResponse(
            readers=[
                peer_pb2.Reader(
                    name=each.name[:_MAX_NAME],
                    transport=each.transport,
                    read_bytes=each.read_bytes,
                    counted=each.counted,
                    seconds=each.seconds,
                    ended_seconds=each.ended_seconds,
                )
                for each in readers[:_MAX_LISTED_READERS]
            ],
            left_out=max(0, len(readers) - _MAX_LISTED_READERS),
        )


async def _check_ids(
    ours: p2p_pb2.GetTensorManifestResponse, source_id: str, worker_id: str | None, context: _Context
) -> None:
    """Abort unless a request is for this source and, if it names one, for this worker."""
    if not source_id:
        await context.abort(_Code.INVALID_ARGUMENT, "mx_source_id is required")
    if source_id != ours.mx_source_id:
        reason = f"this worker holds source {ours.mx_source_id!r}, not {source_id!r}"
        await context.abort(_Code.FAILED_PRECONDITION, reason)
    if worker_id is not None and worker_id != ours.worker_id:
        reason = f"this is worker {ours.worker_id!r}, not {worker_id!r}"
        await context.abort(_Code.FAILED_PRECONDITION, reason)


#: Requests have ids and no more. Many readers may read the manifest at the same time.
_MAX_REQUEST_BYTES = 64 << 10
_RECEIVING_BYTES = 8 << 20
_ANSWER_BYTES = 256 << 20

#: Readers in one answer, and characters of the name of each.
_MAX_LISTED_READERS = 256
_MAX_NAME = 200

#: How long a reader may keep a lease.
_LEASE_SECONDS = 600.0

#: Methods for which the id of the lease suffices: it is a secret of its reader, whose grant may have expired.
_BY_LEASE = (WORKER.path("ReleaseTensorRead"), LEASE.path("RenewLease"), PEER.path("GetAccess"))

_NO_LEASE = "no such lease: it has ended, and the memory may have changed since then"

_DRAINING = "the worker is draining: its memory is about to change"
_NOT_READY = "the worker is not ready: it loads its weights, or takes the digests of its tensors"


class _CountedRefusals:
    """An authenticator that counts the grants that it refuses.

    Args:
        authenticator: Decides.
    """

    def __init__(self, authenticator: Authenticator) -> None:
        self.by_certificate = authenticator.by_certificate
        self._authenticator = authenticator

    async def authenticate(self, call: Call) -> str:
        """The name of the reader."""
        try:
            return await self._authenticator.authenticate(call)
        except RefusedError as exc:
            if call.token is not None:  # readers send none at first: the refusal tells them that they need one
                worker_metrics().grant_refused(exc.refusal.name.lower())
            raise


class _WorkerHealth:
    """``grpc.health.v1.Health`` of a worker: it serves while it is ready and grants leases."""

    def __init__(self, leases: Leases, is_ready: Callable[[], bool]) -> None:
        self._leases = leases
        self._is_ready = is_ready

    async def check(self, request: health_pb2.HealthCheckRequest, context: _Context) -> health_pb2.HealthCheckResponse:
        """Return SERVING while the worker is ready and grants leases."""
        if request.service not in {"", WORKER.name}:
            await context.abort(_Code.NOT_FOUND, f"unknown service: {request.service!r}")
        status = health_pb2.HealthCheckResponse
        serves = not self._leases.refusal and self._is_ready()
        return status(status=status.SERVING if serves else status.NOT_SERVING)

    async def watch(self, _: health_pb2.HealthCheckRequest, context: _Context) -> None:
        """Refuse the call: probes call ``Check`` repeatedly."""
        await context.abort(_Code.UNIMPLEMENTED, "workers do not implement Watch: call Check")


class WorkerServer:
    """Serves ``WorkerService`` in a separate thread, so that any program can use it.

    Args:
        manifest: Manifest of the worker's tensors, with the ids of source and worker.
        address: Address to listen on: ``host:port``; port 0 is any free port.
        tls: Files of TLS; TLS is on if there is a certificate.
        authenticator: Authenticates readers; None to accept every reader. To renew or release a lease its id suffices.
        leases: The leases of readers; by default none, each of which may be kept for ten minutes.
        offered: The tensors, for readers of our own; None offers the manifest alone.
        descriptions: What each transport tells readers, by scheme.
        services: gRPC services of transports, and what implements them.
        is_ready: Returns whether readers can find the worker, for its health checks; by default it is.

    Attributes:
        port: The port it listens on.
        leases: The leases of the current readers.

    Raises:
        ModelExpressError: It cannot listen on the address.
        ResourceError: The system starts no more threads.
        SettingsError: Files of TLS or tokens are not valid.
    """

    def __init__(
        self,
        manifest: p2p_pb2.GetTensorManifestResponse,
        address: str,
        *,
        tls: TlsSettings | None = None,
        authenticator: Authenticator | None = None,
        leases: Leases | None = None,
        offered: OfferedTensors | None = None,
        descriptions: Mapping[str, bytes] | None = None,
        services: Mapping[Service, object] | None = None,
        is_ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self._is_ready = is_ready
        self.leases = leases or Leases(_LEASE_SECONDS)
        self._services: dict[Service, object] = dict(services or {})
        self._by_lease = [*_BY_LEASE, *(service.path(each) for service in self._services for each in service.methods)]
        if offered is not None:
            self._services[PEER] = _PeerService(manifest, self.leases, offered, descriptions or {})
        self._manifest = manifest
        self._address = address
        self._tls = tls or TlsSettings()
        self._authenticator = None if authenticator is None else _CountedRefusals(authenticator)
        if offered is not None:
            self.leases.readers.offered_bytes = offered.nbytes
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mx-worker-service", daemon=True)
        try:
            start_thread(self._thread, f"serve readers on {address}")
        except BaseException:
            self._loop.close()
            raise
        try:
            self.port, self._server = self._wait(self._begin())
        except BaseException:
            self._end_loop()
            raise

    def __enter__(self) -> WorkerServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def drain(self, timeout_seconds: float) -> bool:
        """Grant no more leases and wait for the active ones; return whether all ended in time."""
        return self.leases.drain(timeout_seconds)

    def close(self) -> None:
        """Stop the service at once. Call ``drain`` first to wait for readers."""
        if self._thread.is_alive():
            self._wait(self._server.stop(0))
            self._end_loop()

    async def _begin(self) -> tuple[int, grpc.aio.Server]:
        services: dict[Service, object] = {
            **self._services,
            WORKER: _WorkerService(self._manifest, self.leases),
            LEASE: _LeaseService(self.leases),
            STANDARD_HEALTH: _WorkerHealth(self.leases, self._is_ready),
        }
        handlers = {service.name: handler(service, implementation) for service, implementation in services.items()}
        manifest_bytes = self._manifest.ByteSize()
        limits = MessageLimits(_MAX_REQUEST_BYTES, _RECEIVING_BYTES, max(_ANSWER_BYTES, 16 * manifest_bytes))
        server = new_server(handlers, authenticator=self._authenticator, open_methods=self._by_lease, limits=limits)
        try:
            port = listen(server, self._address, tls=self._tls, authenticator=self._authenticator)
        except RuntimeError as exc:
            message = f"the worker cannot listen on {self._address}: {exc}"
            hint = "end the program that uses the port, or set MX_WORKER_GRPC_PORT"
            raise ModelExpressError(message, hint=hint) from exc
        await server.start()
        return port, server

    def _wait(self, work: Coroutine[Any, Any, _R]) -> _R:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
