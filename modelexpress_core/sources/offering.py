"""A worker that serves its tensors: it publishes its record, and withdraws it before it stops serving."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import ModelExpressError, PlacementError, SettingsError
from modelexpress_core.plugins import PluginManager
from modelexpress_core.settings import from_env
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.discovery.server import ENDPOINT_KEY, TRANSPORTS_KEY
from modelexpress_core.sources.publishing import Publisher, PublishingState, withdraw_on_exit
from modelexpress_core.sources.settings import PublishingSettings, ServerAddress, WorkerSettings
from modelexpress_core.sources.worker_service import Leases, WorkerServer
from modelexpress_core.wire.authentication import open_authenticator
from modelexpress_core.wire.proto.modelexpress import p2p_pb2
from modelexpress_core.wire.settings import AuthSettings, TlsSettings

if TYPE_CHECKING:
    import torch

__all__ = ["Offer", "tensor_descriptors"]


def tensor_descriptors(tensors: Mapping[str, torch.Tensor]) -> Sequence[p2p_pb2.TensorDescriptor]:
    """Addresses of tensors as messages of the protocol: first byte, bytes up to the last element, device, dtype.

    Raises:
        PlacementError: A tensor has no memory, for example on the meta device.
    """
    import torch

    described = []
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            message = f"{name} is not stored as it is read: {tensor.layout}, or a conjugate or negative view"
            raise PlacementError(
                message, tensor=name, hint="offer dense tensors; resolve_conj and resolve_neg make them"
            )
        elements = 0 if tensor.numel() == 0 else 1
        if elements:
            elements += sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if elements and (tensor.is_meta or not tensor.data_ptr()):
            message = f"{name} has no memory: it is on the device {tensor.device}"
            raise PlacementError(message, tensor=name, hint="offer tensors after they have been moved to their device")
        descriptor = p2p_pb2.TensorDescriptor(
            name=name,
            addr=tensor.data_ptr() if elements else 0,
            size=elements * tensor.element_size(),
            device_id=tensor.device.index or 0,
            dtype=str(tensor.dtype).removeprefix("torch."),
        )
        described.append(descriptor)
    return described


class Offer:
    """Offers the tensors of one worker from ``start`` until the end of the ``with`` block.

    Its record has the state initializing until ``ready`` is called. At the end, the offer marks the record as stale,
    waits for readers, and then stops the service. Afterwards no reader uses the memory.

    Args:
        identity: Identity of the tensors; see ``own_identity``.
        tensors: Parameters and buffers by name, on their device.
        worker_rank: Rank of the worker.
        device: Number of the device, added to ``MX_WORKER_GRPC_PORT``.
        transports: Schemes of the transports that can read them.
        record: Further fields of the worker's record, for its transports; by default none.
        load: Returns the load of the worker, from 0 to 1, or None if it is unknown; called for each heartbeat.
        worker_id: A name that no other process uses; by default a new one.
        environ: Environment variables (server, certificates, tokens, ports); by default those of the process.
        plugins: Plugins, which may offer the authenticator; by default those that are installed and allowed.

    Attributes:
        worker_id: Name of the worker.
        endpoint: Address of its service.

    Raises:
        SettingsError: Variables, or files that they name, cannot be used.
        ModelExpressError: The port is taken.
        PlacementError: A tensor has no memory.
    """

    def __init__(
        self,
        identity: SourceIdentity,
        tensors: Mapping[str, torch.Tensor],
        *,
        worker_rank: int = 0,
        device: int = 0,
        transports: Sequence[str],
        record: p2p_pb2.WorkerMetadata | None = None,
        load: Callable[[], float | None] | None = None,
        worker_id: str | None = None,
        environ: Mapping[str, str] | None = None,
        plugins: PluginManager | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        settings = from_env(WorkerSettings, environ)
        tls, auth = from_env(TlsSettings, environ), from_env(AuthSettings, environ)
        authenticator = None
        if auth.mode != "off":
            authenticator = open_authenticator(auth, plugins or PluginManager.discover(environ), environ)
        self._drain_seconds = settings.drain_seconds
        self.worker_id = worker_id or uuid.uuid4().hex
        manifest = p2p_pb2.GetTensorManifestResponse(
            tensors=tensor_descriptors(tensors),
            mx_source_id=identity.source_id,
            worker_id=self.worker_id,
            worker_rank=worker_rank,
            accelerator=identity.gpu_arch,
        )
        self._pid = os.getpid()
        with contextlib.ExitStack() as opened:
            client = opened.enter_context(ServerClient.from_env(environ))
            port = _port(settings, device)
            self._server = opened.enter_context(
                WorkerServer(
                    manifest,
                    f"{_ANY}:{port}",
                    tls=tls,
                    authenticator=authenticator,
                    lease_seconds=settings.lease_seconds,
                )
            )
            host = settings.host or _own_address(Endpoint.parse(from_env(ServerAddress, environ).url))
            scheme = "https://" if tls.certificate else ""  # existing programs expect an address without a scheme
            self.endpoint = f"{scheme}{host}:{self._server.port}"
            published = p2p_pb2.WorkerMetadata()
            if record is not None:
                published.CopyFrom(record)
            published.worker_rank = worker_rank
            published.worker_grpc_endpoint = self.endpoint
            published.accelerator = identity.gpu_arch
            published.topology[TRANSPORTS_KEY] = ",".join(transports)
            published.topology[ENDPOINT_KEY] = self.endpoint
            self._publisher = Publisher(
                client,
                identity,
                published,
                self.worker_id,
                interval_seconds=from_env(PublishingSettings, environ).interval_seconds,
                load=load,
            )
            self._closing = opened.pop_all()

    def __enter__(self) -> Offer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Publish the record, and withdraw it if the process ends. Later calls do nothing."""
        withdraw_on_exit(self._publisher)
        self._publisher.start()

    def ready(self) -> None:
        """Let others read from now on.

        Raises:
            ModelExpressError: The offer was drained.
        """
        if self.leases.draining:
            message = f"the offer of worker {self.worker_id} was drained, and cannot be read again"
            raise ModelExpressError(message, hint="create a new Offer when the weights do not change any more")
        self._publisher.ready()

    @property
    def state(self) -> PublishingState:
        """State of the publication."""
        return self._publisher.state

    @property
    def leases(self) -> Leases:
        """The leases of current readers."""
        return self._server.leases

    def drain(self) -> bool:
        """Withdraw the record, wait for readers, and return whether all ended within ``MX_WORKER_DRAIN_SECONDS``.

        Readers that did not end get an error, so that they do not trust what they read. Does nothing in a forked child:
        the parent continues.
        """
        if os.getpid() != self._pid:
            return True
        self._publisher.withdraw()
        return self._server.drain(self._drain_seconds)

    def close(self) -> None:
        """Drain, and stop serving."""
        if os.getpid() != self._pid:
            return
        try:
            self.drain()
        finally:
            self._closing.close()


def _port(settings: WorkerSettings, device: int) -> int:
    """Port of the service of ``device``; 0 for any free port."""
    port = settings.port + device if settings.port else 0
    if device < 0 or port > _LAST_PORT:
        message = f"device {device} has no port: MX_WORKER_GRPC_PORT is {settings.port}"
        raise SettingsError(message, hint="set MX_WORKER_GRPC_PORT so that the ports of all devices are below 65536")
    return port


_LAST_PORT = 65535

_ANY = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - workers on other hosts connect to it


def _own_address(server: Endpoint) -> str:
    """The local address of connections to the server, which other workers can probably reach."""
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(address)  # nothing is sent
            found = str(sock.getsockname()[0])
            return f"[{found}]" if ":" in found else found
    return socket.gethostname()
