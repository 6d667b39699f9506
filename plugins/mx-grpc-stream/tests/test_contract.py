"""The transport keeps to the contract of all transports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import attrs
import pytest
import torch

from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.contracts.candidates import Peer
from modelexpress_core.contracts.transport import PeerAccess, TensorRead, Transport
from modelexpress_core.providers import TransportProvider
from modelexpress_core.testing import TransportContract
from modelexpress_core.testing.transport_contract import OpenWorker
from modelexpress_core.uri import ModelURI
from mx_grpc_stream._transport import GrpcSession, open_grpc
from mx_grpc_stream.plugin import mx_register_transports
from tests.support.peers import bulk_behind_proxy

pytestmark = pytest.mark.slow


def _stalling(_number: int, _request: bytes) -> Fault | None:
    return Fault("stall", after_bytes=20_000)


@contextlib.contextmanager
def _session(worker: OpenWorker, uri: str, environ: Mapping[str, str]) -> Iterator[tuple[GrpcSession, TensorRead]]:
    """A session, and a read of the worker's tensor."""
    access = PeerAccess(Peer(worker.worker.source_id, worker.worker.worker_id), worker.lease())
    with contextlib.closing(open_grpc(ModelURI.parse(uri), environ).connect(access)) as session:
        yield session, TensorRead("weight", 0, torch.zeros(1 << 20, dtype=torch.uint8))


class TestGrpcTransport(TransportContract):
    """With its bulk channel."""

    @pytest.fixture
    def provider(self) -> TransportProvider:
        (record,) = mx_register_transports()
        return record

    @pytest.fixture
    def stalled(
        self, serve: Callable[[Mapping[str, torch.Tensor]], OpenWorker]
    ) -> Iterator[tuple[GrpcSession, TensorRead]]:
        """A worker whose bulk channel is behind a proxy that passes on nothing after its first bytes."""
        worker = serve({"weight": torch.zeros(1 << 20, dtype=torch.uint8)})
        with bulk_behind_proxy(worker.served, _stalling), _session(worker, worker.uri, {}) as stalled:
            yield stalled


class TestGrpcFrames(TransportContract):
    """Without it."""

    @pytest.fixture
    def provider(self) -> TransportProvider:
        (record,) = mx_register_transports()

        def open_without_bulk(uri: ModelURI, environ: Mapping[str, str]) -> Transport:
            return open_grpc(uri, {**environ, "MX_BULK_PORT": "0"})

        return attrs.evolve(record, factory=open_without_bulk)

    @pytest.fixture
    def stalled(
        self, serve: Callable[[Mapping[str, torch.Tensor]], OpenWorker]
    ) -> Iterator[tuple[GrpcSession, TensorRead]]:
        """A worker behind a proxy that passes on nothing after its first bytes."""
        worker = serve({"weight": torch.zeros(1 << 20, dtype=torch.uint8)})
        port = worker.worker.port
        with TcpProxy("127.0.0.1", port, _stalling) as proxy:
            uri = worker.uri.replace(f":{port}/", f":{proxy.port}/")
            with _session(worker, uri, {"MX_BULK_PORT": "0"}) as stalled:
                yield stalled
