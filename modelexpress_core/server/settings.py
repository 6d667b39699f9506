"""What can be set of a server: by flag, in the environment, or in a file."""

from __future__ import annotations

from attrs import frozen

from modelexpress_core.settings import env, seconds, tcp_port
from modelexpress_core.uri import redacted

__all__ = ["ServerSettings"]


@frozen
class ServerSettings:
    """How the server runs."""

    host: str = env(
        "MODEL_EXPRESS_SERVER_HOST",
        default="0.0.0.0",  # noqa: S104 - workers of other hosts call it
        help="Address that the server listens on.",
    )
    port: int = env(
        "MODEL_EXPRESS_SERVER_PORT",
        default=8001,
        converter=tcp_port,
        help="Port of all gRPC services; 0: any free one.",
    )
    metrics_port: int = env(
        "MODEL_EXPRESS_SERVER_METRICS_PORT",
        default=9401,
        converter=tcp_port,
        help="Port of the Prometheus metrics; 0: any free one.",
    )
    health_port: int | None = env(
        "MODEL_EXPRESS_HEALTH_PORT",
        default=None,
        converter=tcp_port,
        help="Port that serves health alone, without TLS, for probes that speak none; unset: there is no such port.",
    )
    metadata: str = env(
        "MX_METADATA_URI",
        default="memory://",
        shown=redacted,
        help="Where metadata is kept: memory:// (one server, lost with it), redis://, rediss://, or a plugin's.",
    )
    heartbeat_timeout_seconds: float = env(
        "MX_HEARTBEAT_TIMEOUT_SECS",
        default=90.0,
        converter=seconds,
        help="A source whose worker has been silent for this long becomes stale.",
    )
    removal_seconds: float = env(
        "MX_GC_TIMEOUT_SECS",
        default=3600.0,
        converter=seconds,
        help="A stale source whose worker has been silent for this long is removed.",
    )
    reaper_interval_seconds: float = env(
        "MX_REAPER_SCAN_INTERVAL_SECS", default=30.0, converter=seconds, help="How often silent sources are looked for."
    )
    drain_seconds: float = env(
        "MX_DRAIN_SECONDS",
        default=10.0,
        converter=seconds,
        help="How long calls that are under way may take once the server is told to end.",
    )
