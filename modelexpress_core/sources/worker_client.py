"""Calls to a worker that serves its tensors: their addresses, and a lease during reads."""

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
        lease_id: Id for the release.
        manifest: The tensors and their addresses.
    """

    lease_id: str
    manifest: p2p_pb2.GetTensorManifestResponse


class WorkerClient(Client):
    """A connection to one worker. Thread-safe. The constructor sends nothing.

    Args:
        url: The worker's ``worker_grpc_endpoint``: ``host:port``, or a URL; ``https://`` is TLS.
        deadline_seconds: Time limit of each call.
        security: Certificates and token; by default the system's certificates, and the token in its default file.

    Raises:
        InvalidURIError: By the constructor: ``url`` is no address.
        SettingsError: By the constructor: certificates cannot be used.
        NotFoundError: By each call: the worker holds another source, or is another worker.
        BackendError: By each call: unavailable (also while it drains), access denied, deadline, unsupported.
    """

    def __init__(self, url: str, *, deadline_seconds: float = 10.0, security: Security | None = None) -> None:
        # No retries: if a worker does not answer or drains, the reader goes to the next peer.
        super().__init__(
            url, (WORKER,), deadline_seconds=deadline_seconds, security=security or Security(), retries=False
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, url: str) -> WorkerClient:
        """A client for the worker at ``url``, with deadline, certificates and token from ``environ``.

        Raises:
            SettingsError: Variables, or files that they name, cannot be used.
            InvalidURIError: The address is invalid.
        """
        deadline_seconds = from_env(ServerAddress, environ).deadline_seconds
        return cls(url, deadline_seconds=deadline_seconds, security=Security.from_env(environ))

    def manifest(self, source_id: str, worker_id: str | None = None) -> p2p_pb2.GetTensorManifestResponse:
        """The tensors of the worker and their addresses."""
        request = p2p_pb2.GetTensorManifestRequest(mx_source_id=source_id, worker_id=worker_id)
        response: p2p_pb2.GetTensorManifestResponse = self._call(WORKER, "GetTensorManifest", request)
        return response

    @contextlib.contextmanager
    def lease(self, source_id: str, worker_id: str | None = None) -> Iterator[Lease]:
        """A lease for the duration of the ``with`` block.

        Raises:
            BackendError: At the start, or at the end if the worker does not confirm that the lease lasted until then:
                the bytes that were read in the block cannot be trusted.
        """
        request = p2p_pb2.PrepareTensorReadRequest(mx_source_id=source_id, worker_id=worker_id)
        response: p2p_pb2.PrepareTensorReadResponse = self._call(WORKER, "PrepareTensorRead", request)
        release = p2p_pb2.ReleaseTensorReadRequest(
            mx_source_id=source_id, worker_id=worker_id, lease_id=response.lease_id
        )
        try:
            yield Lease(response.lease_id, response.manifest)
        except BaseException:
            with contextlib.suppress(BackendError):  # the block's error is raised; the lease expires
                self._call(WORKER, "ReleaseTensorRead", release)
            raise
        self._call(WORKER, "ReleaseTensorRead", release)
