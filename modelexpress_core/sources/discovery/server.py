"""``server://``: a server that workers publish to, ours or another that speaks the protocol."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import InvalidURIError, ModelExpressError, SettingsError
from modelexpress_core.settings import boolean, from_env
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.metrics import source_metrics
from modelexpress_core.sources.ranking import uniform
from modelexpress_core.sources.settings import ServerAddress
from modelexpress_core.uri import SCHEME_PATTERN, ModelURI
from modelexpress_core.wire.identities import identity_to_message
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["ENDPOINT_KEY", "TRANSPORTS_KEY", "ServerDiscovery", "open_server"]

_log = logging.getLogger(__name__)

#: Under it a worker's topology names the schemes of the transports that it can be read by: ``"nixl,grpc"``.
TRANSPORTS_KEY = "mx_transports"

#: Under it a worker's topology names its WorkerService: ``"10.0.0.5:6555"``, with ``https://`` in front for TLS.
ENDPOINT_KEY = "mx_endpoint"

#: Workers of other clients do not publish it in their topology. So many of them are looked up one by one.
_MAX_LOOKUPS = 8


class ServerDiscovery:
    """Asks a server which workers hold a model and are ready.

    Args:
        client: The connection; it is closed with the discovery.
    """

    def __init__(self, client: ServerClient) -> None:
        self._client = client

    def candidates(self, request: LoadRequest) -> Sequence[Candidate]:
        """Workers of the request's rank with an equal identity, once for each transport, but not the reader itself.

        The URI of each names the worker's own endpoint, which comes with the list, or else with the worker's record: of
        those the first few in this reader's order are looked up.

        Raises:
            BackendError: The server cannot be asked.
        """
        if request.identity is None:
            return ()
        metrics = source_metrics()
        query = p2p_pb2.ListSourcesRequest(
            identity=identity_to_message(request.identity),
            status_filter=p2p_pb2.SOURCE_STATUS_READY,
            worker_rank_filter=request.worker_rank,
        )
        try:
            listed = self._client.list_sources(query)
        except ModelExpressError:
            metrics.listed(request.selector, "error")
            raise
        metrics.listed(request.selector, "ok" if listed else "empty")
        matching = [source for source in listed if source.worker_rank == request.worker_rank]
        metrics.counted(request.selector, "listed", len(listed))
        metrics.counted(request.selector, "rank_matched", len(matching))
        others = [source for source in matching if source.worker_id != request.reader]
        endpoints = self._endpoints(others, request.reader)
        return tuple(
            candidate
            for source in others
            if source.worker_id in endpoints
            for candidate in _ways_to(source, endpoints[source.worker_id], request.assumed_transports)
        )

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def _endpoints(self, sources: Sequence[p2p_pb2.SourceInstanceRef], reader: str) -> Mapping[str, Endpoint]:
        """Endpoints of workers by id. A worker whose endpoint is missing or makes no sense is left out."""
        told = {source.worker_id: source.topology.get(ENDPOINT_KEY, "") for source in sources}
        untold = [source for source in sources if not told[source.worker_id]]
        untold.sort(key=lambda source: uniform(reader, source.worker_id))
        if len(untold) > _MAX_LOOKUPS:
            _log.debug("looking up %d of %d workers whose endpoint is not in the list", _MAX_LOOKUPS, len(untold))
        for source in untold[:_MAX_LOOKUPS]:
            response = self._client.metadata(source.mx_source_id, source.worker_id)
            told[source.worker_id] = response.worker.worker_grpc_endpoint if response.found else ""
        endpoints = {}
        for worker_id, text in told.items():
            try:
                if text:
                    endpoints[worker_id] = Endpoint.parse(text)
            except InvalidURIError as exc:
                _log.debug("passing over the worker %r, whose endpoint makes no sense: %s", worker_id, exc)
        return endpoints


def _ways_to(
    source: p2p_pb2.SourceInstanceRef, endpoint: Endpoint, assumed_transports: Sequence[str]
) -> Iterator[Candidate]:
    """One candidate for each transport of the worker."""
    peer = Peer(
        source_id=source.mx_source_id,
        worker_id=source.worker_id,
        worker_rank=source.worker_rank,
        accelerator=source.accelerator,
        load=source.source_load if source.HasField("source_load") else None,
        updated_at_ms=source.updated_at,
        topology=dict(source.topology),
    )
    path = f"{peer.source_id}/{peer.worker_id}"
    query = {"tls": "1"} if endpoint.tls else {}
    published = peer.topology.get(TRANSPORTS_KEY)
    transports = published.split(",") if published else assumed_transports
    for transport in dict.fromkeys(name.strip().lower() for name in transports):
        if SCHEME_PATTERN.fullmatch(transport):
            yield Candidate(ModelURI(transport, endpoint.target, path, query), "server", peer)
        else:
            _log.debug("the worker %r names a transport that is none: %r", peer.worker_id, transport)


def open_server(uri: ModelURI, settings: Mapping[str, str]) -> ServerDiscovery:
    """The discovery for ``server://`` (the server that the settings name) or ``server://host:port``.

    ``server://host:port?tls=1`` speaks TLS.

    Raises:
        SettingsError: The URI says something else.
    """
    address = from_env(ServerAddress, settings)
    if uri.path or uri.userinfo or uri.query.keys() - {"tls"} or (uri.query and not uri.authority):
        message = f"no address of a server: {uri}"
        raise SettingsError(message, hint="write server://, server://host:port, or server://host:port?tls=1")
    try:
        scheme = "https" if boolean(uri.query.get("tls", "0")) else "http"
    except ValueError as exc:
        message = f"{uri} does not say whether the server speaks TLS: {exc}"
        raise SettingsError(message, hint="write server://host:port?tls=1") from exc
    url = f"{scheme}://{uri.authority}" if uri.authority else address.url
    return ServerDiscovery(ServerClient.from_env(settings, url=url))
