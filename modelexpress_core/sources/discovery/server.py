"""``server://``: finds workers through the ModelExpress server that they publish to, ours or another implementation."""

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
from modelexpress_core.sources.settings import ServerAddress, TrustSettings
from modelexpress_core.sources.trust import Claim, reason_to_distrust
from modelexpress_core.uri import SCHEME_PATTERN, ModelURI
from modelexpress_core.wire.identities import identity_to_message
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["ENDPOINT_KEY", "TRANSPORTS_KEY", "ServerDiscovery", "open_server"]

_log = logging.getLogger(__name__)

#: Key in a worker's topology for the schemes of its transports: ``"nixl,grpc"``.
TRANSPORTS_KEY = "mx_transports"

#: Key in a worker's topology for the address of its WorkerService: ``"10.0.0.5:6555"``, with ``https://`` for TLS.
ENDPOINT_KEY = "mx_endpoint"

#: Other clients publish no endpoint in the topology. At most this many of their workers are looked up one by one.
_MAX_LOOKUPS = 8


class ServerDiscovery:
    """Finds the ready workers of a model that a server knows.

    Args:
        client: The connection, which ``close`` closes.
        trust: Which of them are believed.
    """

    def __init__(self, client: ServerClient, trust: TrustSettings | None = None) -> None:
        self._client = client
        self._trust = trust or TrustSettings()

    def candidates(self, request: LoadRequest) -> Sequence[Candidate]:
        """Return the workers of the request's rank with an equal identity, one candidate per transport.

        The reader itself is excluded, and so are workers that it should not believe, with a warning. The URI of each
        candidate names the worker's endpoint. It comes with the list of sources, or else from the worker's record; only
        the first few workers in this reader's order are looked up so.

        Raises:
            BackendError: A call to the server failed.
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
            answer = self._client.listing(query)
        except ModelExpressError:
            metrics.listed(request.selector, "error")
            raise
        listed = answer.instances
        metrics.listed(request.selector, "ok" if listed else "empty")
        matching = [source for source in listed if source.worker_rank == request.worker_rank]
        metrics.counted(request.selector, "listed", len(listed))
        metrics.counted(request.selector, "rank_matched", len(matching))
        others = [source for source in matching if source.worker_id != request.reader]
        endpoints = self._believed(others, self._endpoints(others, request.reader), answer.caller)
        return tuple(
            candidate
            for source in others
            if source.worker_id in endpoints
            for candidate in _candidates(
                source, endpoints[source.worker_id], request.assumed_transports, self._client.url
            )
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _endpoints(self, sources: Sequence[p2p_pb2.SourceInstanceRef], reader: str) -> Mapping[str, Endpoint]:
        """Return endpoints of workers by id, without the workers whose endpoint is missing or invalid."""
        published = {source.worker_id: source.topology.get(ENDPOINT_KEY, "") for source in sources}
        missing = [source for source in sources if not published[source.worker_id]]
        missing.sort(key=lambda source: uniform(reader, source.worker_id))
        if len(missing) > _MAX_LOOKUPS:
            _log.debug("looking up %d of %d workers whose endpoint is not in the list", _MAX_LOOKUPS, len(missing))
        for source in missing[:_MAX_LOOKUPS]:
            response = self._client.metadata(source.mx_source_id, source.worker_id)
            published[source.worker_id] = response.worker.worker_grpc_endpoint if response.found else ""
        endpoints = {}
        for worker_id, text in published.items():
            try:
                if text:
                    endpoints[worker_id] = Endpoint.parse(text)
            except InvalidURIError as exc:
                _log.debug("skipping the worker %r, because its endpoint is invalid: %s", worker_id, exc)
        return endpoints

    def _believed(
        self, sources: Sequence[p2p_pb2.SourceInstanceRef], endpoints: Mapping[str, Endpoint], caller: str
    ) -> Mapping[str, Endpoint]:
        """Return ``endpoints`` without those of workers that the reader should not believe."""
        distrusted = {}
        for source in sources:
            if source.worker_id in endpoints:
                claim = Claim(endpoints[source.worker_id], source.publisher, source.publisher_address)
                if reason := reason_to_distrust(claim, caller, self._trust):
                    distrusted[source.worker_id] = reason
        if distrusted:
            worker_id, reason = next(iter(distrusted.items()))
            _log.warning("skipping %d workers that are not trusted, such as %r: %s", len(distrusted), worker_id, reason)
        return {worker_id: each for worker_id, each in endpoints.items() if worker_id not in distrusted}


def _candidates(
    source: p2p_pb2.SourceInstanceRef, endpoint: Endpoint, assumed_transports: Sequence[str], server: str
) -> Iterator[Candidate]:
    """Yield one candidate for each transport of the worker."""
    peer = Peer(
        source_id=source.mx_source_id,
        worker_id=source.worker_id,
        worker_rank=source.worker_rank,
        accelerator=source.accelerator,
        load=source.source_load if source.HasField("source_load") else None,
        updated_at_ms=source.updated_at,
        topology=dict(source.topology),
        server=server,
    )
    path = f"{peer.source_id}/{peer.worker_id}"
    query = {"tls": "1"} if endpoint.tls else {}
    published = peer.topology.get(TRANSPORTS_KEY)
    transports = published.split(",") if published else assumed_transports
    for transport in dict.fromkeys(name.strip().lower() for name in transports):
        if SCHEME_PATTERN.fullmatch(transport):
            yield Candidate(ModelURI(transport, endpoint.target, path, query), "server", peer)
        else:
            _log.debug("skipping an invalid transport name of the worker %r: %r", peer.worker_id, transport)


def open_server(uri: ModelURI, settings: Mapping[str, str]) -> ServerDiscovery:
    """Open the discovery for ``server://`` (the server in the settings) or ``server://host:port``.

    ``server://host:port?tls=1`` uses TLS.

    Raises:
        SettingsError: The URI has another form.
    """
    address = from_env(ServerAddress, settings)
    if uri.path or uri.userinfo or uri.query.keys() - {"tls"} or (uri.query and not uri.authority):
        message = f"invalid URI of a server: {uri}"
        raise SettingsError(message, hint="write server://, server://host:port, or server://host:port?tls=1")
    try:
        scheme = "https" if boolean(uri.query.get("tls", "0")) else "http"
    except ValueError as exc:
        message = f"invalid value of tls in {uri}: {exc}"
        raise SettingsError(message, hint="write server://host:port?tls=1") from exc
    url = f"{scheme}://{uri.authority}" if uri.authority else address.url
    return ServerDiscovery(ServerClient.from_env(settings, url=url), from_env(TrustSettings, settings))
