"""A gRPC server on asyncio, as servers and workers run it: its limits, its authentication, its port."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from modelexpress_core.contracts.authenticator import Authenticator
from modelexpress_core.errors import SettingsError
from modelexpress_core.wire.admission import Admission, MessageLimits
from modelexpress_core.wire.authentication import AuthInterceptor
from modelexpress_core.wire.rpc import MESSAGE_OPTIONS, RpcHandler
from modelexpress_core.wire.settings import TlsSettings, missing_for_certificates
from modelexpress_core.wire.tls import server_credentials

__all__ = ["listen", "new_server"]

_OPTIONS = (
    *MESSAGE_OPTIONS,
    ("grpc.so_reuseport", 0),  # a port in use is an error, and is not shared
    ("grpc.max_concurrent_streams", 256),  # per connection; further calls wait on the client's side
    # An estimate of the bandwidth would let each stream send megabytes before its message is read.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.server_handshake_timeout_ms", 20_000),
    # A caller whose machine is gone is noticed, and what it did not read is freed.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)

#: Calls under way, of all connections: each takes tens of kilobytes.
_MOST_CALLS = 16_384


def new_server(
    handlers: Mapping[str, grpc.GenericRpcHandler[Any, Any]],
    *,
    authenticator: Authenticator | None = None,
    open_methods: Iterable[str] = (),
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),  # type: ignore[type-arg]  # generic in the annotations alone
    limits: MessageLimits | None = None,
) -> grpc.aio.Server:
    """A server that listens nowhere yet.

    Args:
        handlers: The handler of each service, by the service's full name. It gets calls of that service alone.
        authenticator: Names the callers; None to answer every caller. Services of health answer every caller anyway.
        open_methods: Paths of methods that answer every caller in spite of ``authenticator``.
        interceptors: Interceptors of each call, also of refused ones; the first is the outermost.
        limits: How many bytes of messages the server holds.
    """
    limits = limits or MessageLimits()
    auth_interceptors = [] if authenticator is None else [AuthInterceptor(authenticator, open_methods)]
    server = grpc.aio.server(
        interceptors=[*interceptors, *auth_interceptors],
        options=[*{**dict(_OPTIONS), "grpc.max_receive_message_length": limits.message_bytes}.items()],
        maximum_concurrent_rpcs=_MOST_CALLS,
    )
    server.add_generic_rpc_handlers([_Services(handlers, Admission(limits))])
    return server


class _Services(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # it is generic in the annotations alone
    """Finds the handler of a call by the service in its path: one look-up, however many services there are.

    Args:
        handlers: The handler of each service, by the service's full name.
        admission: Bounds the memory of the messages and answers of all services.
    """

    def __init__(self, handlers: Mapping[str, grpc.GenericRpcHandler[Any, Any]], admission: Admission) -> None:
        self._services = {f"/{name}": handler.service for name, handler in handlers.items()}
        self._admission = admission

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> RpcHandler | None:
        """The handler of a call; None if no service has the name in its path."""
        find = self._services.get(handler_call_details.method.rpartition("/")[0])
        handler = None if find is None else find(handler_call_details)
        return None if handler is None else self._admission.bounded(handler)


def listen(
    server: grpc.aio.Server, address: str, *, tls: TlsSettings, authenticator: Authenticator | None = None
) -> int:
    """The port of ``server``, which listens on ``address`` once it is started: with TLS if it has a certificate.

    Raises:
        SettingsError: A file of TLS cannot be used, or is not set though the authenticator needs it.
        RuntimeError: The address is in use.
    """
    by_certificate = authenticator is not None and authenticator.by_certificate
    if by_certificate and (missing := missing_for_certificates(tls)):
        message = f"callers are to be authenticated by certificate, and {missing} not set"
        raise SettingsError(message, hint="set MX_TLS_CA_PATH, MX_TLS_CERT_PATH and MX_TLS_KEY_PATH")
    if tls.certificate is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, server_credentials(tls, require_client_certificate=by_certificate))
