"""Addresses that tests need."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

__all__ = ["CLOSED_PORT", "full_port"]

#: Refuses connections. A port that was free a moment ago may be taken by a test that runs beside; the system assigns no
#: port below 1024, and tcpmux, which this one is for, is not in use.
CLOSED_PORT = 1


@contextlib.contextmanager
def full_port() -> Iterator[int]:
    """A port whose queue of connections is full, so that further ones wait."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
