"""`server://` against a real server: which workers it names, and how."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import attrs
import pytest
from prometheus_client import REGISTRY

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import LoadRequest, Peer, Tier
from modelexpress_core.contracts.discovery import Discovery
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.errors import UnavailableError
from modelexpress_core.hooks import hookimpl
from modelexpress_core.plugins import DISCOVERY
from modelexpress_core.providers import TransportProvider
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.discovery import find_candidates
from modelexpress_core.sources.discovery.server import open_server
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from tests.support.plugins import core_and
from tests.support.serving import Serving

READY, STALE = p2p_pb2.SOURCE_STATUS_READY, p2p_pb2.SOURCE_STATUS_STALE
_IDENTITY = SourceIdentity("acme/model", tensor_parallel_size=2)
_REQUEST = LoadRequest(
    mx.ModelURI.parse("memory://host/model"), _IDENTITY, worker_rank=1, reader="me", assumed_transports=("nixl",)
)


class Transports:
    """Two ways to read from peers, of which these tests use no more than the names."""

    @hookimpl
    def mx_register_transports(self) -> list[TransportProvider]:
        return [
            TransportProvider("mx-a", ("nixl",), lambda uri, settings: None, tier=Tier.FABRIC_PEER, assumed=True),  # type: ignore[arg-type, return-value]
            TransportProvider("mx-b", ("grpc",), lambda uri, settings: None, tier=Tier.PEER),  # type: ignore[arg-type, return-value]
        ]


@pytest.fixture
def plugins() -> mx.PluginManager:
    return core_and(mx_both=Transports())


@pytest.fixture
def url(start: Callable[..., Serving]) -> str:
    return start().url


@pytest.fixture
def client(url: str) -> Iterator[ServerClient]:
    with ServerClient(url) as client:
        yield client


def publish(client: ServerClient, worker_id: str, identity: SourceIdentity = _IDENTITY, **fields: Any) -> None:
    worker = p2p_pb2.WorkerMetadata(
        **{"worker_rank": 1, "status": READY, "worker_grpc_endpoint": "10.0.0.5:6555", **fields}
    )
    assert client.publish(identity, worker, worker_id).success


def opened(uri: str, environ: Mapping[str, str]) -> Any:
    return closing(open_server(mx.ModelURI.parse(uri), environ))


def counted(result: str) -> float:
    labels = {"policy": "load_aware", "result": result}
    return REGISTRY.get_sample_value("mx_p2p_list_sources_total", labels) or 0.0


def test_a_peer_comes_with_all_that_is_known_of_it(url: str, client: ServerClient) -> None:
    """Its URI names the transport, the worker's own endpoint, what it holds and its id."""
    publish(client, "w", accelerator="cuda:h100", topology={"rack": "7"})
    beat = p2p_pb2.UpdateStatusRequest(
        mx_source_id=_IDENTITY.source_id, worker_id="w", worker_rank=1, status=READY, source_load=0.25
    )
    assert client.update_status(beat).success

    with opened("server://", {"MODEL_EXPRESS_URL": f"http://{url}"}) as discovery:
        [candidate] = discovery.candidates(_REQUEST)

    assert candidate.peer is not None
    updated = candidate.peer.updated_at_ms
    server = f"http://{url}"
    expected = Peer(_IDENTITY.source_id, "w", 1, "cuda:h100", 0.25, updated, {"rack": "7"}, server)
    assert expected == candidate.peer
    assert candidate.peer.updated_at_ms > 0
    assert ("server", f"nixl://10.0.0.5:6555/{_IDENTITY.source_id}/w") == (candidate.origin, str(candidate.uri))


def test_only_those_that_hold_the_same_are_named(url: str, client: ServerClient) -> None:
    """Of this rank, this identity, ready, and not whoever asks."""
    publish(client, "good")
    publish(client, "me")
    publish(client, "other rank", worker_rank=0)
    publish(client, "stale", status=STALE)
    publish(client, "other model", SourceIdentity("acme/other", tensor_parallel_size=2))
    publish(client, "other layout", attrs.evolve(_IDENTITY, extra_parameters={"layout_signature": "x"}))

    with opened(f"server://{url}", {}) as discovery:
        named = [candidate.peer.worker_id for candidate in discovery.candidates(_REQUEST)]
        without = discovery.candidates(attrs.evolve(_REQUEST, identity=None))

    assert ["good"] == named
    assert [] == [*without]


def test_a_worker_is_named_once_for_each_of_its_transports(url: str, client: ServerClient) -> None:
    """Those that say nothing speak NIXL; what is no scheme is passed over; ids may hold what URIs do not."""
    publish(client, "a/b ?#%", topology={"mx_transports": "grpc, NIXL,grpc,,no scheme"})
    publish(client, "silent")

    with opened(f"server://{url}", {}) as discovery:
        candidates = discovery.candidates(_REQUEST)

    ways = sorted((candidate.uri.scheme, candidate.peer.worker_id) for candidate in candidates)
    assert [("grpc", "a/b ?#%"), ("nixl", "a/b ?#%"), ("nixl", "silent")] == ways
    for candidate in candidates:
        assert [candidate.peer.source_id, candidate.peer.worker_id] == candidate.uri.path.split("/", 1)


def test_peers_are_put_in_order(url: str, client: ServerClient, plugins: mx.PluginManager) -> None:
    """NIXL before gRPC before the place itself; and what is asked of the server is counted."""
    publish(client, "w", topology={"mx_transports": "grpc,nixl,pigeon"})
    before = counted("ok"), counted("empty")
    other = attrs.evolve(_REQUEST, worker_rank=0)

    ranked = find_candidates(plugins, {"MODEL_EXPRESS_URL": url}, _REQUEST)
    nobody = find_candidates(plugins, {"MODEL_EXPRESS_URL": url}, other)

    assert ["nixl", "grpc", "memory"] == [candidate.uri.scheme for candidate in ranked]
    assert ["memory"] == [candidate.uri.scheme for candidate in nobody]
    assert (1, 1) == (counted("ok") - before[0], counted("empty") - before[1])


def test_a_server_that_cannot_be_asked(plugins: mx.PluginManager, caplog: pytest.LogCaptureFixture) -> None:
    """The discovery says so; a load goes on from the place that it was given, with a warning."""
    before = counted("error")
    with opened("server://127.0.0.1:1", {}) as discovery, pytest.raises(UnavailableError, match="ListSources"):
        discovery.candidates(_REQUEST)

    with caplog.at_level(logging.WARNING):
        ranked = find_candidates(plugins, {"MODEL_EXPRESS_URL": "127.0.0.1:1"}, _REQUEST)

    assert ["memory"] == [candidate.uri.scheme for candidate in ranked]
    assert "ListSources" in caplog.text
    assert 2 == counted("error") - before


@pytest.mark.parametrize("key", ["record", "topology"])
def test_a_peer_has_the_tls_flag_of_its_worker(url: str, client: ServerClient, key: str) -> None:
    """It says nothing about the server; the endpoint may come with the list or with the record."""

    def endpoint(text: str) -> dict[str, Any]:
        other = {"worker_grpc_endpoint": ""}
        return {"worker_grpc_endpoint": text} if key == "record" else {**other, "topology": {"mx_endpoint": text}}

    publish(client, "plain", **endpoint("http://10.0.0.5:6555"))
    publish(client, "tls", **endpoint("https://[fd00::5]:6555"))
    publish(client, "none", **endpoint(""))
    publish(client, "nonsense", **endpoint("https://user:secret@host/path"))

    with opened(f"server://{url}", {}) as discovery:
        found = {each.peer.worker_id: (each.uri.authority, each.uri.query) for each in discovery.candidates(_REQUEST)}

    assert {"plain": ("10.0.0.5:6555", {}), "tls": ("[fd00::5]:6555", {"tls": "1"})} == found


def test_a_few_workers_whose_endpoint_is_not_in_the_list_are_looked_up(url: str, client: ServerClient) -> None:
    """So many and no more, in an order that differs from reader to reader and not from time to time."""
    for number in range(20):
        publish(client, f"w{number}")

    def named(reader: str) -> set[str]:
        with opened(f"server://{url}", {}) as discovery:
            return {each.peer.worker_id for each in discovery.candidates(attrs.evolve(_REQUEST, reader=reader))}

    assert (8, 8) == (len(named("a")), len(named("b")))
    assert named("a") == named("a") != named("b")


def test_it_is_found_by_its_scheme(plugins: mx.PluginManager) -> None:
    """As any plugin's discovery is."""
    registered, discovery = plugins.open(DISCOVERY, mx.ModelURI.parse("server://127.0.0.1:1"), {})
    discovery.close()

    protocol: Discovery = discovery
    assert ("server", "modelexpress-core") == (registered.provider.name, registered.plugin.name)
    assert callable(protocol.candidates)
