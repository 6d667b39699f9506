"""A worker of this process that offers tensors to readers, without a server that lists it: for tests of transports."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
from attrs import field, frozen

from modelexpress_core.contracts.authenticator import Authenticator
from modelexpress_core.contracts.transport import ServedTensors, TensorTable
from modelexpress_core.plugins import TRANSPORT, PluginManager
from modelexpress_core.sources.offered_tensors import OfferedTensors
from modelexpress_core.sources.offering import tensor_descriptors
from modelexpress_core.sources.worker_service import Leases, WorkerServer
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from modelexpress_core.wire.settings import TlsSettings

if TYPE_CHECKING:
    import torch

__all__ = ["ServingWorker", "serving_worker"]


@frozen
class ServingWorker:
    """A worker that serves.

    Attributes:
        port: Of its gRPC server, on 127.0.0.1.
        source_id: What it holds.
        worker_id: Its name.
        leases: The leases of its readers.
        offered: Its tensors.
        served: What each transport serves, by scheme.
    """

    port: int
    source_id: str
    worker_id: str
    leases: Leases
    offered: OfferedTensors
    served: Mapping[str, ServedTensors] = field(factory=dict)

    def uri(self, transport: str, **query: str) -> str:
        """The URI of its tensors over ``transport``."""
        parameters = "&".join(f"{name}={value}" for name, value in query.items())
        return f"{transport}://127.0.0.1:{self.port}/{self.source_id}/{self.worker_id}" + (
            parameters and f"?{parameters}"
        )


@contextlib.contextmanager
def serving_worker(
    tensors: Mapping[str, torch.Tensor],
    transports: Sequence[str],
    *,
    source_id: str = "0123456789abcdef",
    worker_id: str = "w",
    plugins: PluginManager | None = None,
    leases: Leases | None = None,
    prepare: Callable[[OfferedTensors], object] = OfferedTensors.digest,
    authenticator: Authenticator | None = None,
    tls: TlsSettings | None = None,
    port: int = 0,
    environ: Mapping[str, str] | None = None,
) -> Iterator[ServingWorker]:
    """Serve ``tensors`` over ``transports`` on 127.0.0.1 during the ``with`` block.

    Args:
        tensors: The tensors by name.
        transports: Schemes.
        source_id: What the worker says that it holds.
        worker_id: Its name.
        plugins: Where the transports come from; by default all that are installed.
        leases: Leases with a clock of the test's own.
        prepare: Takes the digests, or does not.
        authenticator: Names the readers.
        tls: Files of TLS.
        port: The port; 0 is any free one.
        environ: Settings of the transports; by default none.
    """
    manager = plugins or PluginManager.discover({})
    leases = leases or Leases(600)
    offered = OfferedTensors(tensors)
    prepare(offered)
    table = TensorTable(source_id, worker_id, offered.memory, leases.holds)
    manifest = p2p_pb2.GetTensorManifestResponse(
        tensors=tensor_descriptors(tensors), mx_source_id=source_id, worker_id=worker_id
    )
    with contextlib.ExitStack() as opened:
        served: dict[str, ServedTensors] = {}
        for scheme in transports:
            _, transport = manager.open(TRANSPORT, ModelURI(scheme), environ or {})
            opened.callback(transport.close)
            counting = functools.partial(leases.readers.count_sent, scheme)
            served[scheme] = transport.serve(attrs.evolve(table, count_sent=counting))
            opened.callback(served[scheme].close)
        server = opened.enter_context(
            WorkerServer(
                manifest,
                f"127.0.0.1:{port}",
                tls=tls,
                authenticator=authenticator,
                leases=leases,
                offered=offered,
                descriptions={scheme: each.description for scheme, each in served.items()},
                services={service: each for one in served.values() for service, each in one.services.items()},
            )
        )
        yield ServingWorker(server.port, source_id, worker_id, leases, offered, served)
