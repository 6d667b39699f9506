"""``server://``: a server that workers publish to, ours or another that speaks the protocol."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import ModelExpressError, SettingsError
from modelexpress_core.settings import boolean, from_env
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.metrics import source_metrics
from modelexpress_core.sources.settings import ServerAddress
from modelexpress_core.uri import SCHEME_PATTERN, ModelURI
from modelexpress_core.wire.identities import identity_to_message
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["TRANSPORTS_KEY", "ServerDiscovery", "open_server"]

_log = logging.getLogger(__name__)

#: Under it a worker's topology names the schemes of the transports that it can be read by: ``"nixl,grpc"``.
TRANSPORTS_KEY = "mx_transports"

#: What workers speak that do not say: those of other clients.
_DEFAULT_TRANSPORTS = "nixl"


class ServerDiscovery:
    """Asks a server which workers hold a model and are ready.

    Args:
        client: The connection; it is closed with the discovery.
        endpoint: Where it leads: the place that URIs of peers name, because that is where their metadata is.
    """

    def __init__(self, client: ServerClient, endpoint: Endpoint) -> None:
        self._client = client
        self._endpoint = endpoint

    def candidates(self, request: LoadRequest) -> Sequence[Candidate]:
        """Workers of the request's rank with an equal identity, once for each transport; never whoever asks.

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
        others = (source for source in matching if source.worker_id != request.reader)
        return tuple(candidate for source in others for candidate in self._ways_to(source))

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def _ways_to(self, source: p2p_pb2.SourceInstanceRef) -> Iterator[Candidate]:
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
        query = {"tls": "1"} if self._endpoint.tls else {}
        transports = peer.topology.get(TRANSPORTS_KEY) or _DEFAULT_TRANSPORTS
        for transport in dict.fromkeys(name.strip().lower() for name in transports.split(",")):
            if SCHEME_PATTERN.fullmatch(transport):
                yield Candidate(ModelURI(transport, self._endpoint.target, path, query), "server", peer)
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
    return ServerDiscovery(ServerClient.from_env(settings, url=url), Endpoint.parse(url))
