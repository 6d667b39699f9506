"""Calls to a worker that offers what it holds: what lies where, and a lease while it is read."""

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
    """A worker's promise that its memory stays as it is.

    Attributes:
        lease_id: What it is given back by.
        manifest: What lies where.
    """

    lease_id: str
    manifest: p2p_pb2.GetTensorManifestResponse


class WorkerClient(Client):
    """A connection to one worker; thread-safe. Made without a word sent.

    Args:
        url: Its ``worker_grpc_endpoint``: ``host:port``, or a URL; ``https://`` is TLS.
        deadline_seconds: How long each call may take, retries included.
        security: Certificates and token; by default those of this system, and the token at the usual place.

    Raises:
        InvalidURIError: By the constructor, where ``url`` is no address.
        SettingsError: By the constructor, where certificates cannot be used.
        NotFoundError: By each call, where the worker holds another source, or is another worker.
        BackendError: By each call: unavailable (also: it drains), access denied, deadline, unsupported.
    """

    def __init__(self, url: str, *, deadline_seconds: float = 10.0, security: Security | None = None) -> None:
        # A worker that does not answer, or drains, will not serve this reader: the next peer will.
        super().__init__(
            url, (WORKER,), deadline_seconds=deadline_seconds, security=security or Security(), retries=False
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, url: str) -> WorkerClient:
        """To the worker at ``url``, with the deadline, the certificates and the token that the variables say.

        Raises:
            SettingsError: Variables, or files that they name, cannot be used.
            InvalidURIError: The address is none.
        """
        deadline_seconds = from_env(ServerAddress, environ).deadline_seconds
        return cls(url, deadline_seconds=deadline_seconds, security=Security.from_env(environ))

    def manifest(self, source_id: str, worker_id: str | None = None) -> p2p_pb2.GetTensorManifestResponse:
        """What the worker holds."""
        request = p2p_pb2.GetTensorManifestRequest(mx_source_id=source_id, worker_id=worker_id)
        response: p2p_pb2.GetTensorManifestResponse = self._call(WORKER, "GetTensorManifest", request)
        return response

    @contextlib.contextmanager
    def lease(self, source_id: str, worker_id: str | None = None) -> Iterator[Lease]:
        """A lease for as long as the ``with`` block lasts.

        Raises:
            BackendError: Also at the block's end, where the worker does not confirm that the lease lasted until then:
                what was read in the block cannot be trusted.
        """
        request = p2p_pb2.PrepareTensorReadRequest(mx_source_id=source_id, worker_id=worker_id)
        response: p2p_pb2.PrepareTensorReadResponse = self._call(WORKER, "PrepareTensorRead", request)
        release = p2p_pb2.ReleaseTensorReadRequest(
            mx_source_id=source_id, worker_id=worker_id, lease_id=response.lease_id
        )
        try:
            yield Lease(response.lease_id, response.manifest)
        except BaseException:
            with contextlib.suppress(BackendError):  # the block's own error counts; the lease ends by itself
                self._call(WORKER, "ReleaseTensorRead", release)
            raise
        self._call(WORKER, "ReleaseTensorRead", release)
