"""Calls to a ModelExpress server, ours or another implementation, with deadlines, retries and our error classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.contracts.metadata_store import PodReference
from modelexpress_core.settings import from_env
from modelexpress_core.sources.settings import ServerAddress
from modelexpress_core.wire.client import Client, Security
from modelexpress_core.wire.identities import identity_to_message
from modelexpress_core.wire.proto.modelexpress import access_pb2, health_pb2, p2p_pb2
from modelexpress_core.wire.rpc import ACCESS, HEALTH, P2P

__all__ = ["ServerClient"]

_log = logging.getLogger(__name__)

#: Bytes of a page of sources, and how many pages are read.
_PAGE_BYTES = 4 << 20
_MAX_PAGES = 16


class ServerClient(Client):
    """A connection to one server. Thread-safe. The constructor sends nothing.

    Args:
        url: Address of the server: ``host:port``, or a URL; ``https://`` selects TLS.
        deadline_seconds: How long each call may take, retries included.
        security: Certificates and token; by default those of this system, and the token at the usual path.
        retries: Whether a call to an unreachable server is retried within its deadline.

    Raises:
        InvalidURIError: By the constructor, if ``url`` is no valid address.
        SettingsError: By the constructor, if certificates cannot be used.
        BackendError: By each call: unavailable, access denied, deadline, unsupported.
    """

    def __init__(
        self, url: str, *, deadline_seconds: float = 10.0, security: Security | None = None, retries: bool = True
    ) -> None:
        super().__init__(
            url,
            (HEALTH, P2P, ACCESS),
            deadline_seconds=deadline_seconds,
            security=security or Security(),
            retries=retries,
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, *, url: str | None = None) -> ServerClient:
        """Connect as the environment variables say; ``url`` overrides the address.

        Raises:
            SettingsError: Variables, or files that they name, cannot be used.
            InvalidURIError: The address is not valid.
        """
        address = from_env(ServerAddress, environ)
        security = Security.from_env(environ)
        return cls(url or address.url, deadline_seconds=address.deadline_seconds, security=security)

    def another(self) -> ServerClient:
        """Return a second connection to the same server, without retries, for callers that retry themselves.

        The two share no lock, and each is closed separately.
        """
        return ServerClient(
            str(self._endpoint), deadline_seconds=self._deadline_seconds, security=self._security, retries=False
        )

    def health(self) -> health_pb2.GetHealthResponse:
        """Return version, status and uptime of the server."""
        response: health_pb2.GetHealthResponse = self._call(HEALTH, "GetHealth", health_pb2.GetHealthRequest())
        return response

    def publish(
        self,
        identity: SourceIdentity,
        worker: p2p_pb2.WorkerMetadata,
        worker_id: str,
        pod: PodReference | None = None,
    ) -> p2p_pb2.PublishMetadataResponse:
        """Publish the record of a worker, which may name its pod. The response says whether the server accepted it."""
        request = p2p_pb2.PublishMetadataRequest(
            identity=identity_to_message(identity), worker=worker, worker_id=worker_id
        )
        if pod is not None:
            request.pod_name, request.pod_uid, request.pod_namespace = pod.name, pod.uid, pod.namespace
        response: p2p_pb2.PublishMetadataResponse = self._call(P2P, "PublishMetadata", request)
        return response

    def list_sources(self, request: p2p_pb2.ListSourcesRequest | None = None) -> Sequence[p2p_pb2.SourceInstanceRef]:
        """Return the sources that match ``request``, all by default. The latest heartbeat comes first.

        Long lists come in pages. After 64 MiB the rest is left out, with a warning.
        """
        return self.listing(request).instances

    def listing(self, request: p2p_pb2.ListSourcesRequest | None = None) -> p2p_pb2.ListSourcesResponse:
        """Return the same of all pages, with the name of this caller, as the server authenticated it."""
        page = p2p_pb2.ListSourcesRequest()
        page.CopyFrom(request or page)
        page.page_bytes = _PAGE_BYTES
        whole = p2p_pb2.ListSourcesResponse()
        for _ in range(_MAX_PAGES):
            response: p2p_pb2.ListSourcesResponse = self._call(P2P, "ListSources", page)
            page.page_token = response.next_page_token  # other implementations ignore pages, and give no token
            response.ClearField("next_page_token")
            whole.MergeFrom(response)
            if not page.page_token:
                break
        else:
            _log.warning(
                "the server %s lists more than %d MiB of sources; the rest is left out: filter by model or identity",
                self._endpoint,
                _PAGE_BYTES * _MAX_PAGES >> 20,
            )
        whole.instances.sort(key=lambda source: -source.updated_at)  # pages are in the order of ids
        return whole

    def metadata(self, source_id: str, worker_id: str) -> p2p_pb2.GetMetadataResponse:
        """Return the whole record of a worker; ``found`` says whether the server has one."""
        request = p2p_pb2.GetMetadataRequest(mx_source_id=source_id, worker_id=worker_id)
        response: p2p_pb2.GetMetadataResponse = self._call(P2P, "GetMetadata", request)
        return response

    def read_grant(self, source_id: str, worker_id: str) -> access_pb2.GetReadGrantResponse:
        """Return a grant for this caller to read ``source_id`` from ``worker_id``.

        Raises:
            AccessDeniedError: The caller may not read the model.
            NotFoundError: The server does not know the worker, or authenticates no callers.
            UnsupportedError: The server is another implementation.
        """
        request = access_pb2.GetReadGrantRequest(mx_source_id=source_id, worker_id=worker_id)
        response: access_pb2.GetReadGrantResponse = self._call(ACCESS, "GetReadGrant", request)
        return response

    def update_status(self, request: p2p_pb2.UpdateStatusRequest) -> p2p_pb2.UpdateStatusResponse:
        """Send a heartbeat. If the server does not know the worker, the caller publishes the record again."""
        response: p2p_pb2.UpdateStatusResponse = self._call(P2P, "UpdateStatus", request)
        return response
