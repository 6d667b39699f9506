"""The settings of streams between workers."""

from __future__ import annotations

from attrs import frozen

from modelexpress_core.settings import env, seconds

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
