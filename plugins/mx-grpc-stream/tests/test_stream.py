"""Loads over gRPC: bytes in place, and what is noticed when something on the way is not right.

Ranges, leases and ``close`` are tested by the contract of transports, in ``test_contract.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme

import modelexpress_core as mx
from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.contracts.candidates import Peer
from modelexpress_core.contracts.transport import PeerAccess, TensorRead, TensorTable
from modelexpress_core.errors import AccessDeniedError, BackendError, DeadlineError, NotFoundError, UnavailableError
from modelexpress_core.sources.worker_client import WorkerClient
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.settings import TlsSettings
from mx_grpc_stream._transport import GrpcSession, open_grpc
from tests.support.peers import ServingWorker, bulk_behind_proxy, empty_like, serving_worker


def assert_equal(expected: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> None:
    assert [name for name in expected if not torch.equal(expected[name], loaded[name])] == []


#: A reader that uses frames alone: what proxies in these tests pass on is gRPC.
_FRAMES = {"MX_BULK_PORT": "0"}


@pytest.fixture(params=[{}, _FRAMES], ids=["bulk", "frames"])
def environ(request: pytest.FixtureRequest) -> Mapping[str, str]:
    """The variables of a reader."""
    found: Mapping[str, str] = request.param
    return found


@contextlib.contextmanager
def leased(worker: ServingWorker, environ: Mapping[str, str]) -> Iterator[GrpcSession]:
    """A session under a lease."""
    with contextlib.ExitStack() as opened:
        client = opened.enter_context(WorkerClient(f"127.0.0.1:{worker.port}"))
        opened.enter_context(contextlib.suppress(NotFoundError))  # of leases that the test ends
        lease = opened.enter_context(client.lease(worker.source_id))
        transport = open_grpc(ModelURI.parse(worker.uri("grpc")), environ)
        session = transport.connect(PeerAccess(Peer(worker.source_id, worker.worker_id), lease.lease_id))
        try:
            yield session
        finally:
            session.close()


def test_every_tensor_is_in_place(
    worker: ServingWorker, tensors: Mapping[str, torch.Tensor], environ: Mapping[str, str]
) -> None:
    """Whatever its size, dtype, strides and ties; each byte once."""
    here = empty_like(tensors)

    report = mx.load_into(here, worker.uri("grpc"), environ=environ)

    assert_equal(tensors, here)
    needed = sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name != "tied")
    assert needed == report.bytes_needed == report.bytes_fetched
    assert {"plugin": "mx-grpc-stream", "version": "0.1.0"} == report.storage
    assert 3 + 6 == report.verified["digests"]
    assert report.sources[0].channel.startswith("gRPC" if environ else "bulk channel on port ")
    assert 0 == worker.leases.out()


def test_without_a_lease_there_is_nothing(worker: ServingWorker, environ: Mapping[str, str]) -> None:
    """Nor with one that has ended."""
    transport = open_grpc(ModelURI.parse(worker.uri("grpc")), environ)
    read = [TensorRead("large", 0, torch.zeros(4, dtype=torch.uint8))]
    for lease_id in ("", "0" * 32):
        session = transport.connect(PeerAccess(Peer(worker.source_id, worker.worker_id), lease_id))
        with contextlib.closing(session), pytest.raises(NotFoundError, match="no such lease"):
            list(session.read(read))
    with leased(worker, environ) as session:
        worker.leases.drain(0)
        with pytest.raises(NotFoundError, match="no such lease"):
            list(session.read(read))
        assert not read[0].destination.any()


@pytest.mark.parametrize(
    ("name", "offset", "length"), [("large", 9 << 20, 14), ("large", 1 << 63, 4), ("other", 0, 1), ("empty", 0, 1)]
)
def test_only_bytes_of_its_tensors_are_sent(
    worker: ServingWorker, environ: Mapping[str, str], name: str, offset: int, length: int
) -> None:
    """Nothing beyond a tensor's end, and of no other memory."""
    with leased(worker, environ) as session, pytest.raises(BackendError, match="there is no tensor"):
        list(session.read([TensorRead(name, offset, torch.zeros(length, dtype=torch.uint8))]))


@pytest.mark.parametrize("position", [0, 400_000, 4_000_000])
def test_flipped_bits_are_read_again(worker: ServingWorker, tensors: Mapping[str, torch.Tensor], position: int) -> None:
    """The digest of the chunk notices them on the bulk channel."""
    flipped: list[bytes] = []

    def faults(_number: int, request: bytes) -> Fault | None:
        if flipped or b'"large"' not in request:
            return None
        flipped.append(request)
        return Fault("flip", after_bytes=position, of_body=True, bits=16)

    here = empty_like(tensors)
    with bulk_behind_proxy(worker.served["grpc"], faults):
        report = mx.load_into(here, worker.uri("grpc"))

    assert_equal(tensors, here)
    assert report.sources[0].channel.startswith("bulk channel")
    assert report.retries


@pytest.mark.parametrize("kind", ["reset", "truncate", "unavailable"])
@pytest.mark.parametrize("after_bytes", [0, 10, 5_000_000])
def test_what_the_bulk_channel_does_not_deliver_comes_over_grpc(
    worker: ServingWorker,
    tensors: Mapping[str, torch.Tensor],
    kind: Any,
    after_bytes: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whenever it breaks, and every byte once; the log and the report say why."""

    def faults(number: int, _request: bytes) -> Fault | None:
        return Fault(kind, after_bytes=after_bytes, of_body=True) if number else None

    here = empty_like(tensors)
    with bulk_behind_proxy(worker.served["grpc"], faults):
        report = mx.load_into(here, worker.uri("grpc"))

    assert_equal(tensors, here)
    assert report.bytes_needed == report.bytes_fetched
    if kind != "unavailable" and after_bytes < 100:  # else what is left comes over a new connection, or is refused
        assert report.sources[0].channel.startswith("gRPC, since the bulk channel on 127.0.0.1:")
        assert "over gRPC, which is slower" in caplog.text


def test_a_port_that_cannot_be_reached_is_named(
    worker: ServingWorker, tensors: Mapping[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with the next step; the load goes on over gRPC."""
    here = empty_like(tensors)
    bulk = worker.served["grpc"]._bulk  # type: ignore[attr-defined]
    bulk.server.close()

    report = mx.load_into(here, worker.uri("grpc"))

    assert_equal(tensors, here)
    assert f"gRPC, since the bulk channel on 127.0.0.1:{bulk.server.port} cannot be read" in report.sources[0].channel
    assert "allow connections to this port" in caplog.text


def test_a_silent_bulk_channel_ends_the_load(worker: ServingWorker, tensors: Mapping[str, torch.Tensor]) -> None:
    """Within the time that is set, as a silent gRPC stream does."""

    def faults(_number: int, request: bytes) -> Fault | None:
        return Fault("stall", after_bytes=500_000) if b'"large"' in request else None

    with (
        bulk_behind_proxy(worker.served["grpc"], faults),
        pytest.raises(DeadlineError, match="no chunk arrived") as caught,
    ):
        mx.load_into(empty_like(tensors), worker.uri("grpc"), environ={"MX_STALL_SECONDS": "0.5"})
    assert caught.value.peer_at_fault


def test_a_ticket_is_worth_nothing_after_its_lease(worker: ServingWorker) -> None:
    """Whoever has it then: also on a connection that is open."""
    with leased(worker, {}) as session:
        assert session._bulk is not None
        read = TensorRead("large", 0, torch.zeros(4, dtype=torch.uint8))
        assert [0] == list(session.read([read]))
        worker.leases.drain(0)
        with pytest.raises(AccessDeniedError, match="HTTP 401"):
            session._bulk.check()


def test_where_readers_are_authenticated_plain_text_stays_here(tensors: Mapping[str, torch.Tensor]) -> None:
    """The bulk channel then listens on loopback alone, unless a setting says otherwise."""
    table = TensorTable("source", "worker", {}, lambda _lease: False)
    for variables, host in (
        ({}, "::"),
        ({"MX_AUTH_MODE": "token"}, "127.0.0.1"),
        ({"MX_AUTH_MODE": "token", "MX_BULK_PLAINTEXT": "1"}, "::"),
    ):
        served = open_grpc(ModelURI("grpc"), variables).serve(table)
        with contextlib.closing(served):
            assert served._bulk is not None
            assert served._bulk.server._listening.getsockname()[0] in {host, "0.0.0.0" if host == "::" else host}
    served = open_grpc(ModelURI("grpc"), {"MX_BULK_PORT": "0"}).serve(table)
    with contextlib.closing(served):
        assert served._bulk is None


@pytest.mark.parametrize("position", [20_000, 400_000, 3_000_000])
def test_flipped_bits_never_pass(worker: ServingWorker, tensors: Mapping[str, torch.Tensor], position: int) -> None:
    """The frame, the chunk or the protocol notices it; the load fails, or reads once more."""

    def faults(_number: int, _request: bytes) -> Fault | None:
        return Fault("flip", after_bytes=position, bits=16)

    here = empty_like(tensors)
    with TcpProxy("127.0.0.1", worker.port, faults) as proxy:
        uri = worker.uri("grpc").replace(f":{worker.port}/", f":{proxy.port}/")
        with contextlib.suppress(BackendError):
            mx.load_into(here, uri, environ={"MX_STALL_SECONDS": "5", **_FRAMES})
            assert_equal(tensors, here)


def test_a_worker_that_is_gone_is_reported(tensors: Mapping[str, torch.Tensor]) -> None:
    """At once, with its address."""
    with serving_worker(tensors, ["grpc"]) as worker:
        uri = worker.uri("grpc")
    with pytest.raises(UnavailableError) as caught:
        mx.load_into(empty_like(tensors), uri)
    assert uri in str(caught.value)


def test_a_worker_that_falls_silent_ends_the_load(worker: ServingWorker, tensors: Mapping[str, torch.Tensor]) -> None:
    """Within the time that is set, wherever its connection stalls."""

    def faults(_number: int, _request: bytes) -> Fault | None:
        return Fault("stall", after_bytes=500_000)

    with TcpProxy("127.0.0.1", worker.port, faults) as proxy:
        uri = worker.uri("grpc").replace(f":{worker.port}/", f":{proxy.port}/")
        with pytest.raises(DeadlineError, match="no chunk arrived") as caught:
            mx.load_into(empty_like(tensors), uri, environ={"MX_STALL_SECONDS": "0.5", **_FRAMES})
    assert caught.value.peer_at_fault


def test_tls(tensors: Mapping[str, torch.Tensor], tmp_path: Path, environ: Mapping[str, str]) -> None:
    """The certificate is the worker's; readers that trust another authority are told so."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    pair = tmp_path / "pair.pem"
    authority.issue_cert("workers.example").private_key_and_cert_chain_pem.write_to_path(str(pair))
    here = empty_like(tensors)
    files = {"MX_TLS_CERT_PATH": str(pair), "MX_TLS_KEY_PATH": str(pair)}
    tls = TlsSettings(certificate=str(pair), key=str(pair))
    with serving_worker(tensors, ["grpc"], tls=tls, environ=files) as worker:
        uri = worker.uri("grpc", tls="1")
        trusting = {"MX_TLS_CA_PATH": str(tmp_path / "ca.pem"), **environ}
        report = mx.load_into(here, uri, environ={"MX_TLS_PEER_NAME": "workers.example", **trusting})
        assert_equal(tensors, here)
        assert report.sources[0].channel.startswith("gRPC" if environ else "bulk channel on port ")
        with pytest.raises(AccessDeniedError, match="certificate is not trusted"):
            mx.load_into(here, uri, environ={})
        with pytest.raises(AccessDeniedError, match=r"127\.0\.0\.1"):  # the name in the address
            mx.load_into(here, uri, environ=trusting)


def test_no_token_goes_to_a_worker(tensors: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
    """Only the server gets it."""
    seen: list[bytes] = []

    def look(_number: int, request: bytes) -> None:
        seen.append(request)

    (tmp_path / "token").write_text("swordfish-5ecret")
    (tmp_path / "token").chmod(0o600)
    environ = {"MX_AUTH_TOKEN_PATH": str(tmp_path / "token"), "MX_AUTH_TOKEN_PLAINTEXT": "1"}
    with serving_worker(tensors, ["grpc"]) as worker, TcpProxy("127.0.0.1", worker.port, look) as proxy:
        mx.load_into(
            empty_like(tensors), worker.uri("grpc").replace(f":{worker.port}/", f":{proxy.port}/"), environ=environ
        )

    assert seen
    assert b"swordfish" not in b"".join(seen)
