"""A worker in a process of its own or in this one, the server that knows it, and readers that find and lease it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch

from modelexpress_core.contracts.identity import Engine, SourceIdentity
from modelexpress_core.errors import (
    ModelExpressError,
    NotFoundError,
    PlacementError,
    SettingsError,
    UnavailableError,
)
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.identity import own_identity
from modelexpress_core.sources.offering import Offer, tensor_descriptors
from modelexpress_core.sources.worker_client import WorkerClient
from modelexpress_core.wire.identities import identity_to_message
from modelexpress_core.wire.proto.modelexpress import health_pb2, p2p_pb2
from modelexpress_core.wire.rpc import STANDARD_HEALTH, stub
from tests.support.serving import Serving
from tests.support.waiting import eventually

Start = Callable[..., Serving]

READY, STALE = p2p_pb2.SOURCE_STATUS_READY, p2p_pb2.SOURCE_STATUS_STALE

_WEIGHTS = {
    "embed": torch.arange(12.0).view(3, 4),
    "transposed": torch.arange(6, dtype=torch.int32).view(2, 3).t(),
    "part": torch.arange(24, dtype=torch.float64).view(4, 6)[:, 1:3],
    "scalar": torch.tensor(7, dtype=torch.int16),
    "empty": torch.empty(0, 4),
}
_IDENTITY = own_identity("acme/model", _WEIGHTS, engine=Engine.VLLM, engine_version="0.32")


def environ(serving: Serving, **more: str) -> dict[str, str]:
    return {"MODEL_EXPRESS_URL": serving.url, "MX_WORKER_GRPC_PORT": "0", "MX_HEARTBEAT_INTERVAL_SECS": "1", **more}


def status(client: ServerClient, worker_id: str) -> int:
    return client.metadata(_IDENTITY.source_id, worker_id).worker.status


def test_descriptors_say_where_the_bytes_are() -> None:
    """Read from memory at the address, they are the tensor's, also where it is a view with gaps."""
    for descriptor in tensor_descriptors(_WEIGHTS):
        tensor = _WEIGHTS[descriptor.name]
        span = ctypes.string_at(descriptor.addr, descriptor.size)
        whole = torch.frombuffer(bytearray(span), dtype=tensor.dtype) if span else torch.empty(0, dtype=tensor.dtype)
        read = whole.as_strided(tensor.shape, tensor.stride()) if span else whole.view(tensor.shape)
        assert torch.equal(tensor, read), descriptor.name
        assert str(tensor.dtype) == f"torch.{descriptor.dtype}"
    with pytest.raises(PlacementError, match="no memory"):
        tensor_descriptors({"w": torch.empty(2, device="meta")})


def health_of(offer: Offer) -> int:
    """What a readinessProbe of Kubernetes gets; it sends no token."""
    with grpc.insecure_channel(f"127.0.0.1:{offer.endpoint.rpartition(':')[2]}") as channel:
        answer = stub(STANDARD_HEALTH, channel)["Check"](health_pb2.HealthCheckRequest(), timeout=30)
    return int(answer.status)


def test_a_probe_waits_for_the_publication(start: Start) -> None:
    """A worker is not serving before its tensors are ready and the server lists them, nor once it drains."""
    serving = start()
    with (
        ServerClient(serving.url) as client,
        Offer(_IDENTITY, _WEIGHTS, transports=["grpc"], environ=environ(serving)) as offer,
    ):
        assert eventually(lambda: status(client, offer.worker_id) == p2p_pb2.SOURCE_STATUS_INITIALIZING)
        assert health_pb2.HealthCheckResponse.NOT_SERVING == health_of(offer)
        offer.ready()
        assert eventually(lambda: health_of(offer) == health_pb2.HealthCheckResponse.SERVING)
        assert READY == status(client, offer.worker_id)
        offer.drain()
        assert health_pb2.HealthCheckResponse.NOT_SERVING == health_of(offer)


def test_a_probe_fails_where_no_server_accepts_the_worker() -> None:
    """Nobody would find it."""
    settings = {"MODEL_EXPRESS_URL": "127.0.0.1:1", "MX_WORKER_GRPC_PORT": "0"}
    with Offer(_IDENTITY, _WEIGHTS, transports=["grpc"], environ=settings) as offer:
        offer.ready()
        assert eventually(lambda: offer.state.failures)

        assert health_pb2.HealthCheckResponse.NOT_SERVING == health_of(offer)


def test_from_the_offer_to_the_lease(start: Start) -> None:
    """Initializing until it is ready, found by its identity, read under a lease, stale at the end."""
    serving = start()
    with (
        ServerClient(serving.url) as client,
        Offer(_IDENTITY, _WEIGHTS, transports=["grpc"], environ=environ(serving), load=lambda: 0.5) as offer,
    ):
        assert eventually(lambda: status(client, offer.worker_id) == p2p_pb2.SOURCE_STATUS_INITIALIZING)
        offer.ready()
        assert eventually(lambda: status(client, offer.worker_id) == READY)
        [source] = client.list_sources(
            p2p_pb2.ListSourcesRequest(identity=identity_to_message(_IDENTITY), status_filter=READY)
        )
        endpoint = client.metadata(source.mx_source_id, source.worker_id).worker.worker_grpc_endpoint
        with WorkerClient(endpoint) as reader, reader.lease(source.mx_source_id, source.worker_id) as lease:
            assert tensor_descriptors(_WEIGHTS) == list(lease.manifest.tensors)
            assert 1 == offer.leases.out()
        offer.close()

        assert STALE == status(client, offer.worker_id)
        with WorkerClient(endpoint, deadline_seconds=5) as late, pytest.raises(UnavailableError):
            late.manifest(source.mx_source_id)


def test_the_end_waits_for_readers(start: Start) -> None:
    """The record is stale at once, while the memory stays until the last lease is back."""
    serving = start()
    offer = Offer(_IDENTITY, _WEIGHTS, transports=["grpc"], environ=environ(serving))
    offer.start()
    offer.ready()
    with ServerClient(serving.url) as client, WorkerClient(offer.endpoint) as reader, ThreadPoolExecutor() as pool:
        assert eventually(lambda: status(client, offer.worker_id) == READY)
        with reader.lease(_IDENTITY.source_id):
            closing = pool.submit(offer.close)
            assert eventually(lambda: status(client, offer.worker_id) == STALE)
            assert not closing.done()
        closing.result(60)
    assert eventually(lambda: not offer.leases.out())


def test_tls_is_in_the_endpoint(start: Start, tmp_path: Path) -> None:
    """So that readers know, and other programs see that they cannot."""
    import trustme

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "pair.pem"))
    pair = str(tmp_path / "pair.pem")
    files = {"MX_TLS_CA_PATH": str(tmp_path / "ca.pem"), "MX_TLS_CERT_PATH": pair, "MX_TLS_KEY_PATH": pair}
    serving = start(**files)
    variables = environ(serving, MODEL_EXPRESS_URL=f"https://{serving.url}", **files)
    with Offer(_IDENTITY, _WEIGHTS, transports=["grpc"], environ=variables) as offer:
        assert offer.endpoint.startswith("https://127.0.0.1:")
        with WorkerClient.from_env(variables, url=offer.endpoint) as reader:
            assert _IDENTITY.source_id == reader.manifest(_IDENTITY.source_id).mx_source_id


def test_what_is_published_is_what_was_said(start: Start) -> None:
    """Host, port of the device, transports, NIXL's metadata; and how long leases last."""
    serving = start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = environ(
        serving, MX_WORKER_HOST="::1", MX_WORKER_GRPC_PORT=str(port - 3), MX_WORKER_LEASE_SECONDS="0.05"
    )
    with (
        ServerClient(serving.url) as client,
        Offer(
            _IDENTITY,
            _WEIGHTS,
            transports=["inproc", "grpc"],
            device=3,
            worker_rank=5,
            record=p2p_pb2.WorkerMetadata(nixl_metadata=b"agent"),
            environ=variables,
        ) as offer,
    ):
        assert eventually(lambda: client.metadata(_IDENTITY.source_id, offer.worker_id).found)
        said = client.metadata(_IDENTITY.source_id, offer.worker_id).worker
        with (
            WorkerClient(f"127.0.0.1:{port}") as reader,
            pytest.raises(NotFoundError, match="may have changed"),
            reader.lease(_IDENTITY.source_id),
        ):
            time.sleep(0.1)

    assert f"[::1]:{port}" == said.worker_grpc_endpoint
    assert (5, "inproc,grpc", b"agent") == (said.worker_rank, said.topology["mx_transports"], said.nixl_metadata)


@pytest.mark.parametrize(
    ("variables", "device", "said"),
    [
        ({"MX_WORKER_HOST": "http://worker"}, 0, "without scheme and port"),
        ({"MX_WORKER_HOST": "10.0.0.1:6555"}, 0, "without scheme and port"),
        ({"MX_WORKER_GRPC_PORT": "65535"}, 1, "no port for device 1"),
        ({}, -1, "no port for device -1"),
    ],
)
def test_where_no_worker_can_be_reached(variables: dict[str, str], device: int, said: str) -> None:
    """Is told before anything is published."""
    with pytest.raises(SettingsError, match=said):
        Offer(_IDENTITY, _WEIGHTS, transports=["grpc"], device=device, environ=variables)


def test_an_offer_is_made_once(start: Start) -> None:
    """Starting it twice is starting it once; ending it twice, too; and one that was drained is not ready again."""
    serving = start()
    offer = Offer(_IDENTITY, _WEIGHTS, transports=["grpc"], environ=environ(serving))
    offer.start()
    with offer:
        assert offer.drain()
        with pytest.raises(ModelExpressError, match="make a new Offer"):
            offer.ready()
    offer.close()


@pytest.mark.parametrize("way", ["return", "raise"])
def test_children_of_multiprocessing_take_their_record_back(start: Start, way: str) -> None:
    """Which end without what other processes run at their end."""
    serving = start()
    program = f"""
import multiprocessing, os, time, torch
from modelexpress_core.sources.identity import SourceIdentity
from modelexpress_core.sources.offering import Offer
def child():
    offer = Offer(SourceIdentity("acme/other"), {{"w": torch.ones(4)}}, transports=["grpc"], worker_id="w-{way}")
    offer.start()
    offer.ready()
    while offer.state.status != "ready":
        time.sleep(0.01)
    if {way == "raise"}:
        raise ZeroDivisionError
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environ(serving)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    with ServerClient(serving.url) as client:
        found = client.metadata(SourceIdentity("acme/other").source_id, f"w-{way}")

    assert found.found, done.stderr
    assert STALE == found.worker.status


_PROGRAM = """
import sys, torch
from modelexpress_core.sources.identity import SourceIdentity
from modelexpress_core.sources.offering import Offer
with Offer(SourceIdentity("acme/other"), {"w": torch.ones(4)}, transports=["grpc"], worker_id="w-1") as offer:
    offer.ready()
    print("offering", flush=True)
    sys.stdin.read()
"""


def test_sigterm_takes_the_record_back(start: Start) -> None:
    """At once, and the process ends as the signal says."""
    serving = start()
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        env={**os.environ, **environ(serving)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    other = SourceIdentity("acme/other").source_id
    with process, ServerClient(serving.url) as client:
        assert process.stdout is not None
        assert "offering\n" == process.stdout.readline()
        assert eventually(lambda: client.metadata(other, "w-1").worker.status == READY)
        process.send_signal(signal.SIGTERM)

        assert -signal.SIGTERM == process.wait(60)
        assert STALE == client.metadata(other, "w-1").worker.status


def test_a_worker_needs_no_file_of_tokens(start: Start) -> None:
    """The mode says that readers are authenticated: until the server gives a key for their grants, none is answered."""
    variables = environ(start(), MX_AUTH_MODE="token")
    with (
        Offer(_IDENTITY, _WEIGHTS, transports=["grpc"], environ=variables) as offer,
        WorkerClient(offer.endpoint) as reader,
        pytest.raises(UnavailableError, match="not yet been published"),
    ):
        reader.manifest(_IDENTITY.source_id)
