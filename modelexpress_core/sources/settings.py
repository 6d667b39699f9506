"""Where the server is that workers and commands ask."""

from __future__ import annotations

from attrs import frozen

from modelexpress_core.settings import env, seconds

__all__ = ["ServerAddress"]


@frozen
class ServerAddress:
    """The server that knows who holds what."""

    url: str = env(
        "MODEL_EXPRESS_URL",
        "MX_SERVER_ADDRESS",
        default="localhost:8001",
        help="The server: host:port, http://host:port, or https://host:port for TLS.",
    )
    deadline_seconds: float = env(
        "MX_SERVER_DEADLINE_SECONDS", default=10.0, converter=seconds, help="How long one call to the server may take."
    )
