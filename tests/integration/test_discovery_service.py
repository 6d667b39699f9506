"""Workers behind a Service of Kubernetes, found without a server: its name has addresses of this machine here."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import pytest
import torch
import trustme
from safetensors.torch import save_file

import modelexpress_core as mx
from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Skipped
from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.errors import SettingsError, UnavailableError
from modelexpress_core.settings import from_env
from modelexpress_core.sources.discovery.kubernetes_service import ServiceDiscovery, open_service
from modelexpress_core.sources.offering import Offer
from modelexpress_core.sources.settings import DiscoverySettings, ServiceSettings
from modelexpress_core.sources.worker_service import WorkerServer
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.proto.modelexpress import health_pb2, p2p_pb2
from modelexpress_core.wire.rpc import STANDARD_HEALTH, stub
from tests.support.peers import identity_of, tensors_of
from tests.support.waiting import eventually

_IDENTITY = SourceIdentity("acme/model")


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture
def variables(port: int) -> Mapping[str, str]:
    """Of a worker, and of its readers."""
    return {
        "MX_METADATA_BACKEND": "k8s-service",
        "MX_K8S_SERVICE_PATTERN": f"localhost:{port}",
        "MX_WORKER_GRPC_PORT": str(port),
    }


def is_serving(port: int) -> bool:
    """What a readiness probe of the kubelet asks."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = stub(STANDARD_HEALTH, channel)["Check"](health_pb2.HealthCheckRequest(), timeout=30)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_a_worker_is_read_without_a_server(tmp_path: Path, variables: Mapping[str, str], port: int) -> None:
    """From when it is ready until it drains; its own readiness says so to Kubernetes."""
    held = dict(tensors_of(1))
    save_file(held, f"{tmp_path}/model.safetensors")
    checkpoint = f"file://{tmp_path}"

    def loaded_from() -> str:
        tensors = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
        report = mx.load_into(tensors, checkpoint, identity=identity_of(tensors), environ=variables)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in held.items())
        return report.uri

    assert checkpoint == loaded_from()
    with Offer(identity_of(held), held, transports=["grpc"], environ=variables) as offer:
        assert not is_serving(port)
        assert checkpoint == loaded_from()
        offer.ready()
        assert eventually(lambda: is_serving(port))
        assert "ready" == offer.state.status
        assert loaded_from().startswith(("grpc://127.0.0.1:", "grpc://[::1]:"))
        offer.drain()
        assert not is_serving(port)
        assert checkpoint == loaded_from()


def test_over_tls(tmp_path: Path, variables: Mapping[str, str], port: int) -> None:
    """The certificate has a name that all workers share, and no address of a pod."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = authority.issue_cert("workers.acme.example")
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    (tmp_path / "key.pem").chmod(0o600)
    for number, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(str(tmp_path / "cert.pem"), append=number > 0)
    of_worker = {
        **variables,
        "MX_TLS_CERT_PATH": str(tmp_path / "cert.pem"),
        "MX_TLS_KEY_PATH": str(tmp_path / "key.pem"),
        "MX_TLS_CA_PATH": str(tmp_path / "ca.pem"),
    }
    of_reader = {
        **variables,
        "MX_K8S_SERVICE_PATTERN": f"https://localhost:{port}",
        "MX_TLS_CA_PATH": str(tmp_path / "ca.pem"),
        "MX_TLS_PEER_NAME": "workers.acme.example",
    }
    held = dict(tensors_of(1))
    tensors = {name: torch.zeros_like(tensor) for name, tensor in held.items()}

    with Offer(identity_of(held), held, transports=["grpc"], environ=of_worker) as offer:
        offer.ready()
        assert eventually(lambda: offer.state.status == "ready")
        report = mx.load_into(tensors, "memory://nowhere", identity=identity_of(tensors), environ=of_reader)

    assert report.uri.startswith("grpc://")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in held.items())


@pytest.fixture
def worker() -> Iterator[WorkerServer]:
    """A worker of rank 1, as another implementation runs one: its manifest says no transports."""
    manifest = p2p_pb2.GetTensorManifestResponse(
        mx_source_id=_IDENTITY.source_id, worker_id="w", worker_rank=1, accelerator="cuda"
    )
    with WorkerServer(manifest, "127.0.0.1:0") as server:
        yield server


def asked(
    worker: WorkerServer, *addresses: str, rank: int = 1, identity: SourceIdentity = _IDENTITY, reader: str = "me"
) -> tuple[list[Candidate], list[Skipped]]:
    """What a Service with these addresses has for a reader, and what it leaves out."""
    skipped: list[Skipped] = []
    request = LoadRequest(
        ModelURI.parse("memory://nowhere"),
        identity=identity,
        worker_rank=rank,
        reader=reader,
        assumed_transports=("nixl",),
        on_skipped=skipped.append,
    )
    service = ServiceSettings(f"workers-{{rank}}:{worker.port}")
    names = []

    def resolve(host: str, port: int) -> tuple[str, ...]:
        names.append((host, port))
        return addresses

    found = ServiceDiscovery(service, 6555, resolve=resolve).candidates(request)
    assert [(f"workers-{rank}", worker.port)] == names
    return list(found), skipped


def test_each_address_is_asked(worker: WorkerServer) -> None:
    """One that does not answer is left out, with the reason; the candidate names the worker at its own address."""
    found, skipped = asked(worker, "127.0.0.1", "127.0.0.9")

    [candidate] = found
    uri = f"nixl://127.0.0.1:{worker.port}/{_IDENTITY.source_id}/w"
    assert (uri, "k8s-service") == (str(candidate.uri), candidate.origin)
    assert candidate.peer is not None
    assert (1, "cuda") == (candidate.peer.worker_rank, candidate.peer.accelerator)
    assert [f"http://127.0.0.9:{worker.port}"] == [each.place for each in skipped]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 2}, "it has rank 1, and rank 2 is needed"),
        ({"identity": SourceIdentity("acme/other")}, "source"),
        ({"reader": "w"}, "it is this worker itself"),
    ],
)
def test_a_worker_that_is_left_out(worker: WorkerServer, changes: dict[str, object], reason: str) -> None:
    """A Service that selects wrong pods leads to no wrong weights."""
    found, skipped = asked(worker, "127.0.0.1", **changes)  # type: ignore[arg-type]  # keyword arguments

    assert [] == found
    assert reason in skipped[0].reasons[0]


def test_a_name_without_addresses(variables: Mapping[str, str]) -> None:
    """The error says what to check; a load goes on with other places."""
    discovery = open_service(
        ModelURI.parse("k8s-service://"), {**variables, "MX_K8S_SERVICE_PATTERN": "no-such-service.invalid"}
    )
    request = LoadRequest(ModelURI.parse("memory://nowhere"), identity=_IDENTITY)

    with pytest.raises(UnavailableError, match=r"no-such-service\.invalid has no addresses"):
        discovery.candidates(request)


@pytest.mark.parametrize(
    ("pattern", "endpoint"),
    [
        ("mx-sources", "http://mx-sources:6558"),
        ("mx-sources-{rank}:7000", "http://mx-sources-3:7000"),
        ("https://w{rank}.pool.svc", "https://w3.pool.svc:6558"),
    ],
)
def test_the_pattern_names_the_service_of_a_rank(pattern: str, endpoint: str) -> None:
    """By its name, or by the port, as existing deployments do."""
    settings = from_env(ServiceSettings, {"MX_K8S_SERVICE_PATTERN": pattern})

    assert endpoint == str(settings.endpoint(3, 6555))


def test_settings_that_cannot_work(variables: Mapping[str, str]) -> None:
    """Grants need a server; the pattern is an address; nothing follows the scheme."""
    with pytest.raises(SettingsError, match="no server that signs grants"):
        Offer(_IDENTITY, {"w": torch.ones(1)}, transports=["grpc"], environ={**variables, "MX_AUTH_MODE": "token"})
    with pytest.raises(SettingsError, match="MX_K8S_SERVICE_PATTERN"):
        from_env(ServiceSettings, {"MX_K8S_SERVICE_PATTERN": "a b/{rank}"})
    with pytest.raises(SettingsError, match="nothing may follow k8s-service://"):
        open_service(ModelURI.parse("k8s-service://mx-sources"), {})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"MX_METADATA_BACKEND": "server"}, False),
        ({"MX_METADATA_BACKEND": "k8s-service"}, True),
        ({"MX_DISCOVERY": "k8s-service://"}, True),
        ({"MX_DISCOVERY": "k8s-service://,server://"}, False),
    ],
)
def test_who_publishes_to_a_server(environ: dict[str, str], expected: bool) -> None:
    """Workers do, unless a Service alone finds them."""
    assert expected is from_env(DiscoverySettings, environ).without_server
