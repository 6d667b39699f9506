"""Whether a server could listen on its ports, found without listening."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from modelexpress_core.server.settings import ServerSettings
from modelexpress_core.uri import host_and_port

__all__ = ["port_problems"]


def port_problems(settings: ServerSettings) -> list[str]:
    """Why the server of ``settings`` could not listen, a line for each port; none if it could."""
    problems = []
    taken: dict[int, str] = {}
    for variable, port in _ports(settings):
        if port and port in taken:
            problems.append(f"{variable} is {port}, which is the port of {taken[port]}, too")
            continue
        taken[port] = variable
        try:
            _bind(settings.host.strip("[]"), port)
        except (OSError, UnicodeError) as exc:  # the latter for a host that cannot be a name
            reason = getattr(exc, "strerror", None) or exc
            problems.append(f"{variable}: the server cannot listen on {host_and_port(settings.host, port)}: {reason}")
    return problems


def _ports(settings: ServerSettings) -> Iterator[tuple[str, int]]:
    yield "MODEL_EXPRESS_SERVER_PORT", settings.port
    yield "MODEL_EXPRESS_SERVER_METRICS_PORT", settings.metrics_port
    if settings.health_port is not None:
        yield "MODEL_EXPRESS_HEALTH_PORT", settings.health_port


def _bind(host: str, port: int) -> None:
    """Raise unless a socket can be bound to ``host`` and ``port``. It is closed at once, and never listens."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with contextlib.ExitStack() as opened:
        for family, kind, protocol, _, address in found:
            tried = opened.enter_context(socket.socket(family, kind, protocol))
            # A connection of a server that has ended does not keep its port; a server that listens does.
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            tried.bind(address)
