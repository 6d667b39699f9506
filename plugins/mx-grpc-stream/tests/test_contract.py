"""The transport keeps to the contract of all transports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from devtools.tcp_proxy import Fault, TcpProxy
from modelexpress_core.contracts.candidates import Peer
from modelexpress_core.contracts.transport import PeerAccess, TensorRead
from modelexpress_core.providers import TransportProvider
from modelexpress_core.testing import TransportContract
from modelexpress_core.testing.transport_contract import OpenWorker
from modelexpress_core.uri import ModelURI
from mx_grpc_stream._transport import GrpcSession, open_grpc
from mx_grpc_stream.plugin import mx_register_transports

pytestmark = pytest.mark.slow


class TestGrpcTransport(TransportContract):
    @pytest.fixture
    def provider(self) -> TransportProvider:
        (record,) = mx_register_transports()
        return record

    @pytest.fixture
    def stalled(
        self, serve: Callable[[Mapping[str, torch.Tensor]], OpenWorker]
    ) -> Iterator[tuple[GrpcSession, TensorRead]]:
        """A worker behind a proxy that passes on nothing after its first bytes."""
        worker = serve({"weight": torch.zeros(1 << 20, dtype=torch.uint8)})

        def faults(_number: int, _request: bytes) -> Fault | None:
            return Fault("stall", after_bytes=20_000)

        with TcpProxy("127.0.0.1", worker.worker.port, faults) as proxy:
            uri = ModelURI.parse(worker.uri.replace(f":{worker.worker.port}/", f":{proxy.port}/"))
            access = PeerAccess(Peer(worker.worker.source_id, worker.worker.worker_id), worker.lease())
            with contextlib.closing(open_grpc(uri, {"MX_BULK_PORT": "0"}).connect(access)) as session:
                yield session, TensorRead("weight", 0, torch.zeros(1 << 20, dtype=torch.uint8))
