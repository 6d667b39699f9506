"""Tokens go to the server alone, workers get grants, and readers believe the publishers that they trust."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from modelexpress_core.contracts.candidates import LoadRequest
from modelexpress_core.contracts.identity import Engine, SourceIdentity
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import AccessDeniedError, NotFoundError
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.discovery.server import open_server
from modelexpress_core.sources.identity import own_identity
from modelexpress_core.sources.offering import Offer
from modelexpress_core.sources.worker_client import WorkerClient
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.client import Security
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from modelexpress_core.wire.settings import TokenSettings
from tests.support.serving import Serving
from tests.support.waiting import eventually

Start = Callable[..., Serving]

_WEIGHTS = {"w": torch.arange(4.0)}
_IDENTITY = own_identity("acme/model", _WEIGHTS, engine=Engine.VLLM, engine_version="1")
_TOKENS = {"workers": "w0rk" * 8, "reader": "read" * 8}
_READY = p2p_pb2.SOURCE_STATUS_READY


class Fleet:
    """A server that wants tokens, and the variables of those who have one."""

    def __init__(self, start: Start, directory: Path, *arguments: str, **environ: str) -> None:
        lines = [f"{name}:{token}" for name, token in _TOKENS.items()]
        (directory / "tokens").write_text("\n".join(lines))
        for name, token in _TOKENS.items():
            (directory / name).write_text(token)
        self._directory = directory
        self.serving = start(*arguments, MX_AUTH_MODE="token", MX_AUTH_TOKENS_PATH=str(directory / "tokens"), **environ)

    def environ(self, name: str, **more: str) -> Mapping[str, str]:
        return {
            "MODEL_EXPRESS_URL": self.serving.url,
            "MX_AUTH_TOKEN_PATH": str(self._directory / name),
            "MX_WORKER_HOST": "127.0.0.1",
            "MX_WORKER_GRPC_PORT": "0",
            **more,
        }

    def client(self, name: str) -> ServerClient:
        return ServerClient.from_env(self.environ(name))


@pytest.fixture
def fleet(start: Start, tmp_path: Path) -> Fleet:
    return Fleet(start, tmp_path)


@pytest.fixture
def offer(fleet: Fleet) -> Iterator[Offer]:
    """A worker that ``workers`` published."""
    with offered(fleet) as offer:
        yield offer


def offered(fleet: Fleet, **environ: str) -> Offer:
    offer = Offer(_IDENTITY, _WEIGHTS, transports=["grpc"], environ=fleet.environ("workers", **environ))
    offer.start()
    offer.ready()
    assert eventually(lambda: offer.state.status == "ready")
    return offer


class Eavesdropper:
    """A gRPC server that is no worker: it answers nothing, and keeps the metadata of each call."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.heard: list[str] = []

        def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
            self.heard += [f"{key}: {value!r}" for key, value in context.invocation_metadata()]
            context.abort(code, "show your token")
            raise AssertionError

        class Every(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the annotations alone
            def service(self, _: grpc.HandlerCallDetails) -> Any:
                return grpc.unary_unary_rpc_method_handler(refuse)

        self._server = grpc.server(ThreadPoolExecutor(4), handlers=[Every()])
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> Eavesdropper:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_a_worker_never_gets_a_token(fleet: Fleet, code: grpc.StatusCode) -> None:
    """Not even one that says that it wants one; what it gets is of no use elsewhere."""
    with Eavesdropper(code) as worker, fleet.client("workers") as publisher:
        publisher.publish(_IDENTITY, p2p_pb2.WorkerMetadata(status=_READY), "w")
        reader = WorkerClient.from_env(fleet.environ("reader"), url=f"127.0.0.1:{worker.port}")
        with reader, pytest.raises(AccessDeniedError):
            reader.manifest(_IDENTITY.source_id, "w")

    assert worker.heard
    assert not [line for line in worker.heard for token in _TOKENS.values() if token in line]


def test_a_token_is_not_sent_in_plain_text_to_another_host(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The error says so, and what to do; a setting allows it, with one warning. (The host is made to look remote.)"""
    monkeypatch.setattr(Endpoint, "is_loopback", False)
    with fleet.client("reader") as reader, pytest.raises(AccessDeniedError) as refused:
        reader.list_sources()
    with (
        ServerClient.from_env(fleet.environ("reader", MX_AUTH_TOKEN_PLAINTEXT="1")) as allowed,
        caplog.at_level("INFO"),
    ):
        allowed.list_sources()
        allowed.list_sources()

    assert "the token was not sent, because the connection is not encrypted" in str(refused.value)
    assert "https://" in str(refused.value)
    assert "MX_AUTH_TOKEN_PLAINTEXT=1" in str(refused.value)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert 1 == len([record for record in warnings if "without TLS" in record.getMessage()])


def test_a_loopback_server_is_called_without_a_proxy(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would be another host, which would see the token."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)

    with fleet.client("reader") as reader:
        assert reader.list_sources() is not None


# -- grants ------------------------------------------------------------------------------------------------------------


def test_a_reader_that_the_server_knows_gets_a_lease(fleet: Fleet, offer: Offer) -> None:
    """With its token at the server, and a grant at the worker; a stranger gets neither manifest nor lease."""
    with WorkerClient.from_env(fleet.environ("reader"), url=offer.endpoint) as reader:
        with reader.lease(_IDENTITY.source_id, offer.worker_id) as lease:
            assert "w" == lease.manifest.tensors[0].name
            assert 1 == offer.leases.out()
        assert offer.worker_id == reader.manifest(_IDENTITY.source_id, offer.worker_id).worker_id
    stranger = WorkerClient.from_env(fleet.environ("nobody"), url=offer.endpoint)
    with stranger, pytest.raises(AccessDeniedError, match="none was sent"):
        stranger.manifest(_IDENTITY.source_id, offer.worker_id)
    with WorkerClient(offer.endpoint) as alone, pytest.raises(AccessDeniedError, match="none was sent"):
        alone.manifest(_IDENTITY.source_id, offer.worker_id)


def test_a_grant_is_for_one_worker(fleet: Fleet, offer: Offer) -> None:
    """A worker that gets one cannot use it to read another worker as its reader."""
    with offered(fleet) as other, fleet.client("reader") as server:
        grant = server.read_grant(_IDENTITY.source_id, other.worker_id).grant
        with grpc.insecure_channel(offer.endpoint) as channel:
            call = channel.unary_unary("/model_express.p2p.WorkerService/PrepareTensorRead")
            request = p2p_pb2.PrepareTensorReadRequest(mx_source_id=_IDENTITY.source_id).SerializeToString()
            with pytest.raises(grpc.RpcError) as refused:
                call(request, timeout=10, metadata=(("authorization", f"Bearer {grant}"),))

    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert 0 == offer.leases.out()


def test_a_worker_that_is_published_again_accepts_new_grants(start: Start, tmp_path: Path) -> None:
    """With the key that it then gets; a reader whose grant is of the former key asks for another."""
    fleet = Fleet(start, tmp_path)
    port = fleet.serving.url.rpartition(":")[2]
    offer = offered(fleet, MX_HEARTBEAT_INTERVAL_SECS="0.2")
    with offer, WorkerClient.from_env(fleet.environ("reader"), url=offer.endpoint) as reader:
        reader.manifest(_IDENTITY.source_id, offer.worker_id)
        for published in (2, 3):  # more keys than a worker keeps
            fleet.serving.end()
            fleet = Fleet(start, tmp_path, "--port", port)
            assert eventually(lambda published=published: offer.state.published == published)

        assert offer.worker_id == reader.manifest(_IDENTITY.source_id, offer.worker_id).worker_id


def test_a_grant_is_needed_for_what_there_is(fleet: Fleet, start: Start) -> None:
    """No worker, no grant; and a server that authenticates nobody gives none, and no key."""
    with fleet.client("reader") as reader, pytest.raises(NotFoundError, match="unknown worker 'nobody'"):
        reader.read_grant(_IDENTITY.source_id, "nobody")
    with ServerClient(start().url) as open_server_client:
        response = open_server_client.publish(_IDENTITY, p2p_pb2.WorkerMetadata(status=_READY), "w")
        with pytest.raises(NotFoundError, match="authenticates no callers"):
            open_server_client.read_grant(_IDENTITY.source_id, "w")

    assert b"" == response.grant_key


def test_the_key_is_in_no_answer_to_others(fleet: Fleet) -> None:
    """It is the worker's alone, who published."""
    with fleet.client("workers") as worker, fleet.client("reader") as reader:
        key = worker.publish(_IDENTITY, p2p_pb2.WorkerMetadata(status=_READY), "w").grant_key
        answers = [
            reader.listing().SerializeToString(),
            reader.metadata(_IDENTITY.source_id, "w").SerializeToString(),
            reader.read_grant(_IDENTITY.source_id, "w").SerializeToString(),
        ]

    assert 32 == len(key)
    assert not [answer for answer in answers if key in answer]


# -- whom readers believe ----------------------------------------------------------------------------------------------


def found(fleet: Fleet, **environ: str) -> list[str]:
    discovery = open_server(ModelURI.parse("server://"), fleet.environ("reader", **environ))
    try:
        request = LoadRequest(ModelURI.parse("s3://bucket/model"), _IDENTITY, reader="r")
        return [str(candidate.uri) for candidate in discovery.candidates(request)]
    finally:
        discovery.close()


def test_readers_believe_those_whom_they_trust(fleet: Fleet, offer: Offer, caplog: pytest.LogCaptureFixture) -> None:
    """By the name that the server authenticated; others are skipped with a warning that names the setting."""
    assert [] == found(fleet)
    assert f"such as '{offer.worker_id}': it was published by 'workers'" in caplog.text
    assert "MX_TRUSTED_PUBLISHERS" in caplog.text
    assert [f"grpc://{offer.endpoint}/{_IDENTITY.source_id}/{offer.worker_id}"] == found(
        fleet, MX_TRUSTED_PUBLISHERS="work*"
    )


@pytest.mark.parametrize(
    ("endpoint", "hosts", "believed"),
    [
        ("127.0.0.1:6555", "", True),
        ("127.0.0.2:6555", "", False),
        ("127.0.0.2:6555", "127.0.0.0/30", True),
        ("worker.example.com:6555", "", False),
        ("worker.example.com:6555", "*.example.com", True),
        ("169.254.169.254:80", "169.254.0.0/16", False),
    ],
)
@pytest.mark.parametrize("field", ["topology", "record"])
def test_readers_connect_where_the_publisher_is(
    fleet: Fleet, endpoint: str, hosts: str, believed: bool, field: str
) -> None:
    """Or where the user says; whether the list has the endpoint, or the record that other clients publish."""
    worker = p2p_pb2.WorkerMetadata(status=_READY, worker_grpc_endpoint=endpoint)
    worker.topology["mx_transports"] = "grpc"
    if field == "topology":
        worker.topology["mx_endpoint"] = endpoint
    with fleet.client("workers") as publisher:
        publisher.publish(_IDENTITY, worker, "w")

    uris = found(fleet, MX_TRUSTED_PUBLISHERS="workers", MX_PEER_HOSTS=hosts)

    assert ([f"grpc://{endpoint}/{_IDENTITY.source_id}/w"] if believed else []) == uris


# -- rights ------------------------------------------------------------------------------------------------------------


def test_rights_in_the_configuration(start: Start, tmp_path: Path) -> None:
    """Who may publish or read which models; what a caller may not read is in no list."""
    rules = [
        {"names": ["workers"], "models": ["acme/*"], "allow": ["publish", "read"]},
        {"names": ["reader"], "models": ["acme/public-*"], "allow": ["read"]},
    ]
    (tmp_path / "mx.yaml").write_text(json.dumps({"auth": {"rights": rules}}))
    fleet = Fleet(start, tmp_path, MX_SERVER_CONFIG=str(tmp_path / "mx.yaml"))
    public, secret = SourceIdentity("acme/public-1"), SourceIdentity("acme/secret")
    metadata = p2p_pb2.WorkerMetadata(status=_READY)
    with fleet.client("workers") as workers, fleet.client("reader") as reader:
        for identity in (public, secret):
            assert workers.publish(identity, metadata, "w").success
        with pytest.raises(AccessDeniedError, match="'workers' may not publish 'other/model'"):
            workers.publish(SourceIdentity("other/model"), metadata, "w")
        with pytest.raises(AccessDeniedError, match="'reader' may not publish"):
            reader.publish(public, metadata, "mine")
        for call in (reader.metadata, reader.read_grant):
            assert call(public.source_id, "w")
            with pytest.raises(AccessDeniedError, match="'reader' may not read 'acme/secret'"):
                call(secret.source_id, "w")
        heartbeat = p2p_pb2.UpdateStatusRequest(mx_source_id=secret.source_id, worker_id="w", status=_READY)

        assert ["acme/public-1"] == [source.model_name for source in reader.list_sources()]
        assert ["acme/public-1", "acme/secret"] == sorted(source.model_name for source in workers.list_sources())
        assert workers.update_status(heartbeat).success


def test_wrong_rights_stop_the_server(tmp_path: Path, mx: Callable[..., Any]) -> None:
    """With the line, and what is wrong."""
    path = tmp_path / "mx.yaml"
    path.write_text("auth:\n  rights:\n    - names: [a]\n      models: ['*']\n      allow: [write]\n")

    done = mx("serve", "--config", str(path), "--check")

    assert 1 == done.returncode
    assert re.search(r"line 2: auth\.rights: .*unknown right 'write'", done.stderr), done.stderr


def test_many_readers_at_once(fleet: Fleet, offer: Offer) -> None:
    """Each gets its lease; none ends with another's grant."""
    barrier = threading.Barrier(8)

    def read(_: int) -> str:
        barrier.wait(30)
        with (
            WorkerClient.from_env(fleet.environ("reader"), url=offer.endpoint) as reader,
            reader.lease(_IDENTITY.source_id, offer.worker_id) as lease,
        ):
            return lease.manifest.worker_id

    with ThreadPoolExecutor(8) as pool:
        assert [offer.worker_id] * 8 == list(pool.map(read, range(8)))
    assert 0 == offer.leases.out()


def test_a_token_among_the_settings_of_a_connection_to_a_worker_is_not_sent(tmp_path: Path) -> None:
    """Also without a server that would grant the read."""
    (tmp_path / "token").write_text("t0ken" * 8)
    security = Security(token=TokenSettings(str(tmp_path / "token"), plaintext=True))
    with Eavesdropper(grpc.StatusCode.UNAUTHENTICATED) as worker:
        reader = WorkerClient(f"127.0.0.1:{worker.port}", security=security)
        with reader, pytest.raises(AccessDeniedError):
            reader.manifest("s", "w")

    assert worker.heard
    assert not [line for line in worker.heard if line.startswith("authorization")]


def test_mx_sources_shows_who_published(fleet: Fleet, offer: Offer, mx: Callable[..., Any]) -> None:
    """In the table and as JSON."""
    environ = {**fleet.environ("reader"), "COLUMNS": "250"}

    [source] = json.loads(mx("sources", "--json", environ=environ).stdout)
    table = mx("sources", environ=environ).stdout

    assert ("workers", "127.0.0.1") == (source["publisher"], source["publisher_address"])
    assert ["publisher", "publisher address"] == [
        word.strip() for word in table.splitlines()[0].split("  ") if "publ" in word
    ]
    assert re.search(r" workers +127\.0\.0\.1 ", table)
