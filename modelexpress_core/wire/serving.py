"""A gRPC server on asyncio as servers and workers run it: its limits, its door, its port."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import grpc
import grpc.aio

from modelexpress_core.wire.authentication import Authenticated, authenticator
from modelexpress_core.wire.rpc import MESSAGE_OPTIONS, Service, handler
from modelexpress_core.wire.settings import AuthSettings, TlsSettings
from modelexpress_core.wire.tls import server_credentials

__all__ = ["listen", "new_server"]

_OPTIONS = (
    *MESSAGE_OPTIONS,
    ("grpc.so_reuseport", 0),  # a port that somebody has is an error, and is not shared
    ("grpc.max_concurrent_streams", 256),  # of one connection; other calls wait on the client's side
)


def new_server(
    services: Mapping[Service, object],
    *,
    auth: AuthSettings,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),  # type: ignore[type-arg]  # generic in the annotations alone
    others: Iterable[grpc.GenericRpcHandler[object, object]] = (),
) -> grpc.aio.Server:
    """A server that offers ``services``, and answers only those whom ``auth`` admits; it listens nowhere yet.

    Args:
        services: What implements each.
        auth: Who is answered. Services of health answer everybody.
        interceptors: Around each call, also those that are refused; the first is the outermost.
        others: Services that are no ``Service``.

    Raises:
        SettingsError: The file of tokens makes no sense.
    """
    knows = authenticator(auth)
    door = [] if knows is None else [Authenticated(knows)]
    server = grpc.aio.server(interceptors=[*interceptors, *door], options=_OPTIONS)
    offered = [handler(service, implementation) for service, implementation in services.items()]
    server.add_generic_rpc_handlers([*offered, *others])
    return server


def listen(server: grpc.aio.Server, address: str, *, tls: TlsSettings, auth: AuthSettings) -> int:
    """The port of ``server``, which listens on ``address`` once it is started: with TLS where it has a certificate.

    Raises:
        SettingsError: Files of TLS make no sense.
        RuntimeError: Somebody has the address.
    """
    auth.check(tls)
    if tls.certificate is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, server_credentials(tls, clients_prove=auth.mode == "mtls"))
