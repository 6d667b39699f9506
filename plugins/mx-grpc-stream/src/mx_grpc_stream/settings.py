"""The settings of transfers between workers."""

from __future__ import annotations

from attrs import frozen

from modelexpress_core.settings import boolean, env, seconds, tcp_port

__all__ = ["GrpcStreamSettings"]


@frozen
class GrpcStreamSettings:
    """How workers read from each other over gRPC."""

    read_timeout_seconds: float = env(
        "MX_GRPC_READ_TIMEOUT_SECONDS",
        default=600.0,
        converter=seconds,
        help="How long one stream of 32 MiB may take in all, from a worker that is still alive.",
    )
    bulk_port: int = env(
        "MX_BULK_PORT",
        default=7655,
        converter=tcp_port,
        help="Port of the bulk channel of the first device; the others use the ports after it, and any free port if "
        "theirs is in use. 0: no bulk channel, everything goes over gRPC.",
    )
    bulk_plaintext: bool = env(
        "MX_BULK_PLAINTEXT",
        default=False,
        converter=boolean,
        help="Offer the bulk channel without TLS to other hosts, though MX_AUTH_MODE authenticates callers: others on "
        "the network can then read tickets and weights. By default it is offered to this host alone then.",
    )
