"""Bounds the memory of streams of file content: how many there are, and how much each has on its way."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import grpc

from modelexpress_core.wire.peers import peer_host
from modelexpress_core.wire.rpc import RpcContext

__all__ = ["Streams"]

#: Memory of all streams. A stream has a message that is made, one that is sent, and gRPC's copies of both.
_MEMORY_BYTES = 96 << 20
_COPIES = 5

#: Content of a message, however many streams there are.
_SMALLEST_BYTES = 32 << 10

#: Streams at once, of all callers and of one address.
_MOST = 512
_MOST_OF_HOST = 384

#: A message that its reader does not take in this time ends the call.
_STALLED_SECONDS = 60.0


class Streams:
    """The streams of a server that carry content of files. They share its memory equally."""

    def __init__(self) -> None:
        self._streams = 0
        self._of_host: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Streams that are open."""
        return self._streams

    def message_bytes(self, most: int) -> int:
        """How much content the next message of a stream may have, at most ``most``."""
        share = _MEMORY_BYTES // (_COPIES * max(1, self._streams))
        return min(most, max(_SMALLEST_BYTES, share))

    @contextlib.asynccontextmanager
    async def opened(self, context: RpcContext) -> AsyncIterator[None]:
        """Count a stream in the ``async with`` block; the call ends if there are too many."""
        host = peer_host(context.peer())
        if self._streams >= _MOST or self._of_host[host] >= _MOST_OF_HOST:
            reason = f"{self._streams} streams of files are open, of which {self._of_host[host]} are of {host}"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{reason}: ask again in a moment")
        self._streams += 1
        self._of_host[host] += 1
        try:
            yield
        finally:
            self._streams -= 1
            self._of_host[host] -= 1
            if not self._of_host[host]:
                del self._of_host[host]

    @staticmethod
    @contextlib.contextmanager
    def sending() -> Iterator[None]:
        """Send one message in the ``with`` block; if its reader does not take it, the call is cancelled."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker: handlers run in tasks
        timer = asyncio.get_running_loop().call_later(_STALLED_SECONDS, task.cancel)
        try:
            yield
        finally:
            timer.cancel()
