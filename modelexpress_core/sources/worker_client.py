"""Calls to the WorkerService of a worker: its manifest, and leases for reading.

The token of the reader goes to the server alone. A worker that wants to know its readers gets a read grant, which the
server signs for this reader, this source and this worker.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
from attrs import frozen

from modelexpress_core.contracts.transport import TensorLayout
from modelexpress_core.errors import AccessDeniedError, BackendError, DeadlineError, NotFoundError
from modelexpress_core.messages import printable
from modelexpress_core.resources import start_thread
from modelexpress_core.settings import from_env
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.settings import ServerAddress
from modelexpress_core.wire.client import Client, Security
from modelexpress_core.wire.proto.modelexpress import access_pb2, p2p_pb2, peer_pb2
from modelexpress_core.wire.rpc import LEASE, PEER, WORKER, Service

__all__ = ["Description", "Lease", "WorkerClient"]


_log = logging.getLogger(__name__)

#: How often a lease is renewed before it would end: two renewals may be lost.
_RENEWALS_PER_TERM = 4

#: What a transport may tell readers.
_MAX_DESCRIPTION_BYTES = 16 << 20

#: How long the descriptions of all tensors may take.
_DESCRIBING_SECONDS = 60.0

#: A grant is used up to this long before it expires.
_GRANT_MARGIN_SECONDS = 30.0


@frozen
class _Grant:
    """A read grant, and when it is too old to be used, by the monotonic clock."""

    text: str
    until: float


@frozen
class Lease:
    """A worker's promise not to change its memory.

    Attributes:
        lease_id: Id that releases the lease.
        manifest: Addresses and sizes of the tensors.
    """

    lease_id: str
    manifest: p2p_pb2.GetTensorManifestResponse


@frozen
class Description:
    """A tensor of a worker.

    Attributes:
        layout: Its layout.
        digests: The digest of each of its chunks; empty for a tensor that shares memory with another one.
    """

    layout: TensorLayout
    digests: tuple[int, ...]

    @classmethod
    def of_message(cls, message: peer_pb2.TensorDescription) -> Description:
        """From what the worker sent.

        Raises:
            BackendError: It makes no sense.
        """
        try:
            layout = TensorLayout(message.name, message.shape, message.stride, message.dtype, message.same_memory_as)
        except ValueError as exc:
            reason = f"the worker described a tensor that cannot exist: {printable(str(exc))[:200]}"
            raise BackendError(reason, operation="compare the tensors") from exc
        return cls(layout, tuple(message.digests))


class WorkerClient(Client):
    """A connection to one worker. Thread-safe. The constructor sends nothing.

    Args:
        url: The worker's ``worker_grpc_endpoint``: ``host:port``, or a URL; ``https://`` selects TLS.
        deadline_seconds: How long each call may take.
        security: Certificates; by default those of this system. A token among them is not sent.
        server: The server that grants reads, for workers that want a grant; closed with this connection.
        most_answer_bytes: Longest answer that is taken.

    Raises:
        InvalidURIError: By the constructor, if ``url`` is no valid address.
        SettingsError: By the constructor, if certificates cannot be used.
        NotFoundError: By each call, if the worker holds another source, or is another worker.
        BackendError: By each call: unavailable (or draining), access denied, deadline, unsupported.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline_seconds: float = 10.0,
        security: Security | None = None,
        server: ServerClient | None = None,
        most_answer_bytes: int | None = None,
    ) -> None:
        security = (security or Security()).for_worker()
        # No retries: if a worker does not answer, or drains, the next peer is the better choice.
        super().__init__(
            url,
            (WORKER, LEASE, PEER),
            deadline_seconds=deadline_seconds,
            security=security,
            retries=False,
            most_answer_bytes=most_answer_bytes,
        )
        self._server = server
        self._grants: dict[tuple[str, str], _Grant] = {}

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        url: str,
        server: str | None = None,
        deadline_seconds: float | None = None,
        most_answer_bytes: int | None = None,
    ) -> WorkerClient:
        """Connect to the worker at ``url``, with deadline and certificates from the environment variables.

        Args:
            environ: Variables; by default the process's.
            url: The worker's ``worker_grpc_endpoint``.
            server: URL of the server that grants reads: ``Peer.server``. By default the one that variables name.
            deadline_seconds: How long each call may take; by default what the variable says.
            most_answer_bytes: Longest answer that is taken; by default that of all clients.

        Raises:
            SettingsError: Variables, or files that they name, cannot be used.
            InvalidURIError: The address is not valid.
        """
        return cls(
            url,
            deadline_seconds=deadline_seconds or from_env(ServerAddress, environ).deadline_seconds,
            security=Security.from_env(environ),
            most_answer_bytes=most_answer_bytes,
            server=ServerClient.from_env(environ, url=server or None),
        )

    def close(self) -> None:
        """Close the connections to the worker and the server."""
        super().close()
        if self._server is not None:
            self._server.close()

    def manifest(self, source_id: str, worker_id: str | None = None) -> p2p_pb2.GetTensorManifestResponse:
        """Return the manifest of the worker's tensors."""
        request = p2p_pb2.GetTensorManifestRequest(mx_source_id=source_id, worker_id=worker_id)
        response: p2p_pb2.GetTensorManifestResponse = self._call_granted(WORKER, "GetTensorManifest", request)
        self._check_ids(response, source_id, worker_id)
        return response

    def _check_ids(self, manifest: p2p_pb2.GetTensorManifestResponse, source_id: str, worker_id: str | None) -> None:
        """Raise if the answer is of another source or worker than the one that was asked for.

        Raises:
            NotFoundError: It is.
        """
        source_differs = manifest.mx_source_id not in {"", source_id}
        worker_differs = bool(worker_id) and manifest.HasField("worker_id") and manifest.worker_id != worker_id
        if source_differs or worker_differs:
            reason = (
                f"the worker answers as {printable(manifest.worker_id)[:200]!r} "
                f"with source {printable(manifest.mx_source_id)[:200]!r}"
            )
            raise NotFoundError(
                reason,
                uri=self.url,
                operation="ask for the manifest",
                peer_at_fault=True,
                cause="another program listens there, or it is not the worker that it was published as",
                hint="find the workers that hold the model again",
            )

    def describe(
        self,
        source_id: str,
        worker_id: str,
        *,
        most_tensors: int,
        most_bytes: int,
        most_seconds: float = _DESCRIBING_SECONDS,
    ) -> list[Description]:
        """Return layouts and digests of the worker's tensors, in the order of their names.

        Args:
            source_id: The source that it holds.
            worker_id: The worker; empty for any.
            most_tensors: How many tensors a worker with the same layout has: one with more is not read further.
            most_bytes: How many bytes their descriptions may have.
            most_seconds: How long all pages may take. A worker decides how short a page is, and so how many there are.

        Raises:
            DeadlineError: The pages took too long.
            NotFoundError: The worker holds other tensors than the reader needs: more, or such with longer descriptions.
            BackendError: A call failed.
        """
        found: list[Description] = []
        nbytes = 0
        deadline = time.monotonic() + most_seconds
        while True:
            if time.monotonic() > deadline:
                reason = f"the worker described {len(found)} of {most_tensors} tensors in {most_seconds:.1f} s"
                raise DeadlineError(
                    reason,
                    uri=self.url,
                    operation="compare the tensors",
                    peer_at_fault=True,
                    cause="it answers slowly, with few tensors at a time",
                    hint="check the worker, and the network to it",
                )
            request = peer_pb2.DescribeTensorsRequest(mx_source_id=source_id, worker_id=worker_id, first=len(found))
            page: peer_pb2.DescribeTensorsResponse = self._call_granted(PEER, "DescribeTensors", request)
            nbytes += page.ByteSize()
            if page.total > most_tensors or len(found) + len(page.tensors) > page.total or nbytes > most_bytes:
                reason = f"the worker describes {page.total} tensors, in {nbytes} bytes or more, not {most_tensors}"
                raise NotFoundError(
                    reason,
                    uri=self.url,
                    operation="compare the tensors",
                    cause="it runs another model, or another version of the engine",
                    hint="compare the identities of both workers",
                )
            found += map(Description.of_message, page.tensors)
            if len(found) == page.total:
                return found
            if not page.tensors:
                reason = f"the worker described {len(found)} of {page.total} tensors"
                raise BackendError(reason, uri=self.url, operation="compare the tensors")

    def access(self, lease_id: str, transport: str) -> bytes:
        """Return what a transport of the worker tells readers, and prove that the worker is alive.

        Raises:
            NotFoundError: The lease has ended, or the worker does not offer its tensors over this transport.
            BackendError: The call failed.
        """
        request = peer_pb2.GetAccessRequest(lease_id=lease_id, transport=transport)
        response: peer_pb2.GetAccessResponse = self._call(PEER, "GetAccess", request)
        if len(response.description) > _MAX_DESCRIPTION_BYTES:
            reason = f"the worker describes its tensors for {transport} in {len(response.description)} bytes"
            raise BackendError(
                reason,
                uri=self.url,
                operation="read the tensors",
                peer_at_fault=True,
                cause=f"another version of the plugin: at most {_MAX_DESCRIPTION_BYTES} bytes are taken",
                hint="compare the versions of both workers",
            )
        return response.description

    def readers(self, source_id: str, worker_id: str) -> peer_pb2.ListReadersResponse:
        """Return who reads from the worker now, and who has for a while.

        Raises:
            UnsupportedError: The worker is of another client of the protocol.
            BackendError: The call failed.
        """
        request = peer_pb2.ListReadersRequest(mx_source_id=source_id, worker_id=worker_id)
        response: peer_pb2.ListReadersResponse = self._call_granted(PEER, "ListReaders", request)
        return response

    @contextlib.contextmanager
    def lease(
        self, source_id: str, worker_id: str | None = None, *, read_bytes: Callable[[], int] = lambda: 0
    ) -> Iterator[Lease]:
        """Hold a lease during the ``with`` block. A thread renews it, if the worker takes renewals.

        Args:
            source_id: The source that the worker holds.
            worker_id: The worker; None for any.
            read_bytes: How many bytes have arrived, for a worker that does not see the reads.

        Raises:
            BackendError: The call failed; or, at the end of the block, the worker does not confirm that the lease
                lasted until then, so that data read in the block cannot be trusted.
        """
        request = p2p_pb2.PrepareTensorReadRequest(mx_source_id=source_id, worker_id=worker_id, renews=True)
        response: p2p_pb2.PrepareTensorReadResponse = self._call_granted(WORKER, "PrepareTensorRead", request)
        release = p2p_pb2.ReleaseTensorReadRequest(
            mx_source_id=source_id, worker_id=worker_id, lease_id=response.lease_id
        )
        try:
            self._check_ids(response.manifest, source_id, worker_id)
            with self._renewing(response.lease_id, response.renew_within_seconds, read_bytes):
                yield Lease(response.lease_id, response.manifest)
        except BaseException:
            release.read_bytes = read_bytes()
            with contextlib.suppress(BackendError):  # the error of the block is raised; the lease will expire
                self._call(WORKER, "ReleaseTensorRead", release)
            raise
        release.read_bytes = read_bytes()
        self._call(WORKER, "ReleaseTensorRead", release)

    def renew(self, lease_id: str, *, deadline_seconds: float | None = None) -> None:
        """Renew a lease, which proves that the worker is alive and that its memory is unchanged.

        Args:
            lease_id: The lease.
            deadline_seconds: How long the call may take; by default as long as any other.

        Raises:
            NotFoundError: The lease has ended.
            BackendError: The call failed.
        """
        request = access_pb2.RenewLeaseRequest(lease_id=lease_id)
        self._call(LEASE, "RenewLease", request, deadline_seconds=deadline_seconds)

    @contextlib.contextmanager
    def _renewing(self, lease_id: str, within_seconds: float, read_bytes: Callable[[], int]) -> Iterator[None]:
        """Renew a lease until the end of the block; 0 seconds mean that it needs no renewal."""
        if not within_seconds:
            yield
            return
        ended = threading.Event()
        interval_seconds = within_seconds / _RENEWALS_PER_TERM

        def renew() -> None:
            while not ended.wait(interval_seconds):
                request = access_pb2.RenewLeaseRequest(lease_id=lease_id, read_bytes=read_bytes())
                try:
                    self._call(LEASE, "RenewLease", request, deadline_seconds=interval_seconds)
                except NotFoundError:
                    return  # its release will raise that
                except BackendError as exc:
                    _log.debug("the lease was not renewed, and is tried again: %s", exc)

        thread = threading.Thread(target=renew, name="mx-lease", daemon=True)
        start_thread(thread, "renew the lease")
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _error(self, exc: Any, method: str, *, closed: bool = False) -> BackendError:  # noqa: ANN401 - as in the base
        """The error, with next steps for a worker in place of those for a server."""
        error = super()._error(exc, method, closed=closed)
        if error.hint and "MODEL_EXPRESS_URL" in error.hint:
            error.hint = "check that the worker runs, and that its port (MX_WORKER_GRPC_PORT) can be reached from here"
        elif error.hint and "mx health" in error.hint:
            error.hint = "read from another worker, or try again"
        return error

    def _call_granted(self, service: Service, method: str, request: Any) -> Any:  # noqa: ANN401 - three messages
        """The response of ``method``; the worker gets a read grant if it wants one."""
        key = (request.mx_source_id, request.worker_id)
        grant = self._grants.get(key)
        credential = grant.text if grant is not None and time.monotonic() < grant.until else None
        try:
            return self._call(service, method, request, credential=credential)
        except AccessDeniedError as exc:
            if not _wants_grant(exc):
                raise
            if self._server is None or not request.worker_id:
                exc.cause, exc.hint = _WANTS_GRANT
                raise
        # Also if a grant was sent: the worker may have been published again since then, with a new key.
        asked = time.monotonic()
        answer = self._server.read_grant(*key)
        self._grants[key] = _Grant(answer.grant, asked + answer.valid_for_seconds - _GRANT_MARGIN_SECONDS)
        return self._call(service, method, request, credential=answer.grant)


#: Likely cause and next step where a worker wants a grant, and no server can be asked for one.
_WANTS_GRANT = (
    "the worker wants a read grant, which the server gives for a worker whose id is known",
    "find the worker through the server, and not by its address alone: set MODEL_EXPRESS_URL",
)


def _wants_grant(exc: AccessDeniedError) -> bool:
    call: Any = exc.__cause__  # gRPC's error, which annotations give no code
    return isinstance(call, grpc.RpcError) and call.code() is grpc.StatusCode.UNAUTHENTICATED
