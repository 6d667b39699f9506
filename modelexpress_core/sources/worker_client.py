"""Calls to the WorkerService of a worker: its manifest, and leases for reading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from attrs import frozen

from modelexpress_core.errors import BackendError
from modelexpress_core.settings import from_env
from modelexpress_core.sources.settings import ServerAddress
from modelexpress_core.wire.client import Client, Security
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from modelexpress_core.wire.rpc import WORKER

__all__ = ["Lease", "WorkerClient"]


@frozen
class Lease:
    """A worker's promise not to change its memory.

    Attributes:
        lease_id: Id that releases the lease.
        manifest: Addresses and sizes of the tensors.
    """

    lease_id: str
    manifest: p2p_pb2.GetTensorManifestResponse


class WorkerClient(Client):
    """A connection to one worker. Thread-safe. The constructor sends nothing.

    Args:
        url: The worker's ``worker_grpc_endpoint``: ``host:port``, or a URL; ``https://`` selects TLS.
        deadline_seconds: How long each call may take.
        security: Certificates and token; by default those of this system, and the token at the usual path.

    Raises:
        InvalidURIError: By the constructor, if ``url`` is no valid address.
        SettingsError: By the constructor, if certificates cannot be used.
        NotFoundError: By each call, if the worker holds another source, or is another worker.
        BackendError: By each call: unavailable (or draining), access denied, deadline, unsupported.
    """

    def __init__(self, url: str, *, deadline_seconds: float = 10.0, security: Security | None = None) -> None:
        # No retries: if a worker does not answer, or drains, the next peer is the better choice.
        super().__init__(
            url, (WORKER,), deadline_seconds=deadline_seconds, security=security or Security(), retries=False
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, url: str) -> WorkerClient:
        """Connect to the worker at ``url``, with deadline, certificates and token from the environment variables.

        Raises:
            SettingsError: Variables, or files that they name, cannot be used.
            InvalidURIError: The address is not valid.
        """
        deadline_seconds = from_env(ServerAddress, environ).deadline_seconds
        return cls(url, deadline_seconds=deadline_seconds, security=Security.from_env(environ))

    def manifest(self, source_id: str, worker_id: str | None = None) -> p2p_pb2.GetTensorManifestResponse:
        """Return the manifest of the worker's tensors."""
        request = p2p_pb2.GetTensorManifestRequest(mx_source_id=source_id, worker_id=worker_id)
        response: p2p_pb2.GetTensorManifestResponse = self._call(WORKER, "GetTensorManifest", request)
        return response

    @contextlib.contextmanager
    def lease(self, source_id: str, worker_id: str | None = None) -> Iterator[Lease]:
        """Hold a lease during the ``with`` block.

        Raises:
            BackendError: The call failed; or, at the end of the block, the worker does not confirm that the lease
                lasted until then, so that data read in the block cannot be trusted.
        """
        request = p2p_pb2.PrepareTensorReadRequest(mx_source_id=source_id, worker_id=worker_id)
        response: p2p_pb2.PrepareTensorReadResponse = self._call(WORKER, "PrepareTensorRead", request)
        release = p2p_pb2.ReleaseTensorReadRequest(
            mx_source_id=source_id, worker_id=worker_id, lease_id=response.lease_id
        )
        try:
            yield Lease(response.lease_id, response.manifest)
        except BaseException:
            with contextlib.suppress(BackendError):  # the error of the block is raised; the lease will expire
                self._call(WORKER, "ReleaseTensorRead", release)
            raise
        self._call(WORKER, "ReleaseTensorRead", release)
