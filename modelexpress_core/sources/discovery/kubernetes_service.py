"""``k8s-service://``: finds workers behind a Service of Kubernetes, without a server of ModelExpress.

The Service lists the pods that are ready; its name in the DNS has their addresses, if it is headless. Each worker is
asked itself, through its WorkerService, for the source that this reader needs. A pod behind the Service is believed:
where that is not enough, use a server, or client certificates.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import attrs

from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import BackendError, SettingsError, UnavailableError
from modelexpress_core.settings import from_env
from modelexpress_core.sources.discovery.server import TRANSPORTS_KEY
from modelexpress_core.sources.ranking import uniform
from modelexpress_core.sources.settings import ServiceSettings, WorkerSettings
from modelexpress_core.sources.worker_client import WorkerClient
from modelexpress_core.uri import SCHEME_PATTERN, ModelURI
from modelexpress_core.wire.client import Security
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["ServiceDiscovery", "open_service"]

_log = logging.getLogger(__name__)

#: Workers of a Service that one reader asks, and how many at once. Each reader asks others.
_MAX_ASKED = 16
_AT_ONCE = 8
_ASKING_SECONDS = 5.0

#: Longest manifest that is taken: it names all tensors.
_MAX_MANIFEST_BYTES = 64 << 20


class ServiceDiscovery:
    """Finds the workers of a rank behind a Service.

    Args:
        service: The Service of each rank.
        first_port: Port of the workers of rank 0, if the Service has none.
        security: Certificates for the workers.
        resolve: Returns the addresses of a host name.
    """

    def __init__(
        self,
        service: ServiceSettings,
        first_port: int,
        security: Security | None = None,
        resolve: Callable[[str, int], Iterable[str]] | None = None,
    ) -> None:
        self._service = service
        self._first_port = first_port
        self._security = security
        self._resolve = resolve or _addresses

    def candidates(self, request: LoadRequest) -> Sequence[Candidate]:
        """Return the workers of the request's rank with an equal identity, one candidate per transport.

        Raises:
            UnavailableError: The name of the Service has no addresses.
        """
        if request.identity is None:
            return ()
        endpoint = self._service.endpoint(request.worker_rank, self._first_port)
        try:
            addresses = sorted(set(self._resolve(endpoint.host, endpoint.port)))
        except OSError as exc:
            raise UnavailableError(
                f"the name {endpoint.host} has no addresses: {exc}",
                operation="find workers behind a Service",
                cause="there is no such Service, or none of its pods is ready",
                hint="check MX_K8S_SERVICE_PATTERN, and the pods of the Service",
            ) from exc
        addresses.sort(key=lambda address: uniform(request.reader, address))
        if len(addresses) > _MAX_ASKED:
            _log.debug("asking %d of %d workers behind %s", _MAX_ASKED, len(addresses), endpoint.host)
        workers = [attrs.evolve(endpoint, host=address) for address in addresses[:_MAX_ASKED]]
        source_id = request.identity.source_id
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="mx-service") as pool:
            answers = pool.map(lambda worker: self._ask(worker, source_id), workers)
        return [
            candidate
            for worker, answer in zip(workers, answers, strict=True)
            for candidate in _candidates(worker, answer, request)
        ]

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def _ask(self, worker: Endpoint, source_id: str) -> p2p_pb2.GetTensorManifestResponse | BackendError:
        try:
            with WorkerClient(
                str(worker),
                deadline_seconds=_ASKING_SECONDS,
                security=self._security,
                most_answer_bytes=_MAX_MANIFEST_BYTES,
            ) as client:
                return client.manifest(source_id)
        except BackendError as exc:
            return exc


def open_service(uri: ModelURI, settings: Mapping[str, str]) -> ServiceDiscovery:
    """Open the discovery for ``k8s-service://``.

    Raises:
        SettingsError: Text follows ``k8s-service://``, or a variable cannot be used.
    """
    if uri.authority or uri.path or uri.query:
        message = f"nothing may follow k8s-service:// in the URI of the discovery: {uri}"
        raise SettingsError(message, hint="write k8s-service://, and name the Service in MX_K8S_SERVICE_PATTERN")
    first_port = from_env(WorkerSettings, settings).port
    return ServiceDiscovery(from_env(ServiceSettings, settings), first_port, Security.from_env(settings))


def _addresses(host: str, port: int) -> Iterable[str]:
    for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        yield str(address[0])


def _candidates(
    worker: Endpoint, answer: p2p_pb2.GetTensorManifestResponse | BackendError, request: LoadRequest
) -> Iterable[Candidate]:
    """The candidates of one worker, or why it has none."""
    if isinstance(answer, BackendError):
        request.skip(str(worker), answer.headline, answer.hint or "")
        return
    if answer.worker_rank != request.worker_rank:
        reason = f"it has rank {answer.worker_rank}, and rank {request.worker_rank} is needed"
        request.skip(str(worker), reason, "let the Service of each rank select the pods of that rank alone")
        return
    if not answer.worker_id or answer.worker_id == request.reader:
        request.skip(str(worker), "it is this worker itself" if answer.worker_id else "it has no id")
        return
    peer = Peer(
        source_id=answer.mx_source_id,
        worker_id=answer.worker_id,
        worker_rank=answer.worker_rank,
        accelerator=answer.accelerator,
        topology=answer.topology,
    )
    listed = [each for each in answer.topology.get(TRANSPORTS_KEY, "").split(",") if SCHEME_PATTERN.fullmatch(each)]
    query = {"tls": "1"} if worker.tls else {}
    path = f"{peer.source_id}/{peer.worker_id}"
    for transport in listed or request.assumed_transports:
        yield Candidate(ModelURI(transport, worker.target, path, query), "k8s-service", peer)
