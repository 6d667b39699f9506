"""``server://``: finds workers through the ModelExpress server that they publish to, ours or another implementation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import attrs
from attrs import frozen

from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Peer, Skipped
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import InvalidURIError, ModelExpressError, SettingsError
from modelexpress_core.messages import printable
from modelexpress_core.settings import boolean, from_env
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.metrics import source_metrics
from modelexpress_core.sources.ranking import uniform
from modelexpress_core.sources.settings import ServerAddress, TrustSettings
from modelexpress_core.sources.trust import Claim, reason_to_distrust
from modelexpress_core.uri import SCHEME_PATTERN, ModelURI
from modelexpress_core.wire.identities import identity_from_message, identity_to_message
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["ENDPOINT_KEY", "TRANSPORTS_KEY", "ServerDiscovery", "open_server"]

_log = logging.getLogger(__name__)

#: Key in a worker's topology for the schemes of its transports: ``"nixl,grpc"``.
TRANSPORTS_KEY = "mx_transports"

#: Key in a worker's topology for the address of its WorkerService: ``"10.0.0.5:6555"``, with ``https://`` for TLS.
ENDPOINT_KEY = "mx_endpoint"

#: Other clients publish no endpoint in the topology. At most this many of their workers are looked up one by one.
_MAX_LOOKUPS = 8

#: Workers that the server left out are looked up one by one, if somebody asks why. At most so many.
_MAX_EXPLAINED = 64

#: Why a worker in another state than READY is not read.
_STATUS_REASONS = {
    p2p_pb2.SOURCE_STATUS_INITIALIZING: "it is not ready yet: it loads, or takes the digests of its tensors",
    p2p_pb2.SOURCE_STATUS_STALE: "it is stale: it has withdrawn, or its heartbeats have stopped",
}


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
        found = self._examined(others, self._endpoints(others, request.reader), answer.caller, request)
        distrusted = [each for each in found if each.distrust]
        if distrusted:
            worker_id, reason = distrusted[0].source.worker_id, distrusted[0].distrust
            _log.warning("skipping %d workers that are not trusted, such as %r: %s", len(distrusted), worker_id, reason)
        if request.on_skipped is not None:
            for each in found:
                if each.reasons:
                    request.on_skipped(each.skipped(self._client.url))
            self._report_unlisted(request, request.on_skipped, {_key(source) for source in others})
        return tuple(candidate for each in found if not each.reasons for candidate in each.candidates(self._client.url))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _endpoints(self, sources: Sequence[p2p_pb2.SourceInstanceRef], reader: str) -> Mapping[str, str]:
        """Return what workers publish as their endpoints, by id, without the workers that were not looked up."""
        published = {source.worker_id: source.topology.get(ENDPOINT_KEY, "") for source in sources}
        missing = [source for source in sources if not published[source.worker_id]]
        missing.sort(key=lambda source: uniform(reader, source.worker_id))
        if len(missing) > _MAX_LOOKUPS:
            _log.debug("looking up %d of %d workers whose endpoint is not in the list", _MAX_LOOKUPS, len(missing))
        for source in missing[:_MAX_LOOKUPS]:
            response = self._client.metadata(source.mx_source_id, source.worker_id)
            published[source.worker_id] = response.worker.worker_grpc_endpoint if response.found else ""
        for source in missing[_MAX_LOOKUPS:]:
            del published[source.worker_id]
        return published

    def _examined(
        self,
        sources: Sequence[p2p_pb2.SourceInstanceRef],
        endpoints: Mapping[str, str],
        caller: str,
        request: LoadRequest,
    ) -> Sequence[_Examined]:
        """Return for each worker why a load with ``request`` does not read it, and where it would."""
        return [
            _examined(source, endpoints.get(source.worker_id), caller, self._trust, request.assumed_transports)
            for source in sources
        ]

    def _report_unlisted(
        self, request: LoadRequest, report: Callable[[Skipped], None], listed: Collection[tuple[str, str]]
    ) -> None:
        """Say of the model's other workers why the server did not list them: identity, rank and status.

        The server decides, by the same fields of the records that are compared here.
        """
        assert request.identity is not None  # noqa: S101 - for the type checker: ``candidates`` asks
        answer = self._client.listing(p2p_pb2.ListSourcesRequest(model_name_filter=request.identity.model_name))
        unlisted = [source for source in answer.instances if _key(source) not in listed]
        for source in unlisted[:_MAX_EXPLAINED]:
            record = self._client.metadata(source.mx_source_id, source.worker_id)
            if not record.found:
                continue
            endpoint = source.topology.get(ENDPOINT_KEY) or record.worker.worker_grpc_endpoint
            [found] = self._examined([source], {source.worker_id: endpoint}, answer.caller, request)
            reasons = list(found.reasons)
            if source.worker_id == request.reader:
                reasons.append("it is this worker itself")
            if source.worker_rank != request.worker_rank:
                reasons.append(f"it has rank {source.worker_rank}, and rank {request.worker_rank} is needed")
            if record.worker.status != p2p_pb2.SOURCE_STATUS_READY:
                reasons.append(_STATUS_REASONS.get(record.worker.status, "it is in no known state"))
            other = source.mx_source_id != request.identity.source_id
            if not other and not reasons:
                reasons.append("it became ready just now")
            identity = identity_from_message(record.identity) if other else None
            report(attrs.evolve(found, reasons=tuple(reasons)).skipped(self._client.url, identity))
        if len(unlisted) > _MAX_EXPLAINED:
            rest = len(unlisted) - _MAX_EXPLAINED
            request.skip(f"{rest} more workers", f"only {_MAX_EXPLAINED} are looked up", "`mx sources` lists them all")


@frozen
class _Examined:
    """A worker as a reader sees it.

    Attributes:
        source: Its entry in the server's list.
        endpoint: Its address; None if it has none that can be used.
        transports: Schemes of its transports.
        reasons: Why it is not read; empty if it is.
        distrust: The one of them for which it is not believed.
    """

    source: p2p_pb2.SourceInstanceRef
    endpoint: Endpoint | None
    transports: Sequence[str]
    reasons: Sequence[str]
    distrust: str = ""

    def candidates(self, server: str) -> Iterator[Candidate]:
        """Yield one candidate for each transport of the worker."""
        peer = self.peer(server)
        path = f"{peer.source_id}/{peer.worker_id}"
        if self.endpoint is not None:
            query = {"tls": "1"} if self.endpoint.tls else {}
            for transport in self.transports:
                yield Candidate(ModelURI(transport, self.endpoint.target, path, query), "server", peer)

    def peer(self, server: str) -> Peer:
        """The worker."""
        source = self.source
        return Peer(
            source_id=source.mx_source_id,
            worker_id=source.worker_id,
            worker_rank=source.worker_rank,
            accelerator=source.accelerator,
            load=source.source_load if source.HasField("source_load") else None,
            updated_at_ms=source.updated_at,
            topology=dict(source.topology),
            server=server,
        )

    def skipped(self, server: str, identity: SourceIdentity | None = None) -> Skipped:
        """It, as it is reported: with ``identity``, if that is another one."""
        return Skipped(
            f"worker {printable(self.source.worker_id)}",
            tuple(self.reasons),
            hint="set MX_TRUSTED_PUBLISHERS or MX_PEER_HOSTS, if it is yours" if self.distrust else "",
            peer=self.peer(server),
            identity=identity,
            uris=tuple(candidate.uri for candidate in self.candidates(server)),
        )


def _key(source: p2p_pb2.SourceInstanceRef) -> tuple[str, str]:
    return source.mx_source_id, source.worker_id


def _examined(
    source: p2p_pb2.SourceInstanceRef,
    published: str | None,
    caller: str,
    trust: TrustSettings,
    assumed_transports: Sequence[str],
) -> _Examined:
    """Return what a reader makes of a worker whose endpoint is ``published``, or None if it was not looked up."""
    endpoint, reasons, distrust = None, [], ""
    try:
        endpoint = Endpoint.parse(published) if published else None
    except InvalidURIError as exc:
        _log.debug("skipping the worker %r, because its endpoint is invalid: %s", source.worker_id, exc)
        reasons.append(f"its address is invalid: {exc.headline}")
    if published is None:
        reasons.append(f"its address is not in the list, and only {_MAX_LOOKUPS} workers are looked up")
    elif not published:
        reasons.append("it published no address")
    if endpoint is not None:
        distrust = reason_to_distrust(Claim(endpoint, source.publisher, source.publisher_address), caller, trust)
        if distrust:
            reasons.append(distrust)
    transports = _transports(source, assumed_transports)
    if not transports:
        reasons.append("it names no transport, and none that is installed is assumed")
    return _Examined(source, endpoint, transports, reasons, distrust)


def _transports(source: p2p_pb2.SourceInstanceRef, assumed_transports: Sequence[str]) -> Sequence[str]:
    """Return the schemes of a worker's transports."""
    published = source.topology.get(TRANSPORTS_KEY)
    transports = published.split(",") if published else assumed_transports
    usable = []
    for transport in dict.fromkeys(name.strip().lower() for name in transports):
        if SCHEME_PATTERN.fullmatch(transport):
            usable.append(transport)
        else:
            _log.debug("skipping an invalid transport name of the worker %r: %r", source.worker_id, transport)
    return usable


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
