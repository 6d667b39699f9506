"""Bounds the memory of streams of file content: how many there are, and how much each has on its way."""

from __future__ import annotations

from collections import Counter

import grpc
from attrs import define, field

from modelexpress_core.wire.peers import peer_host
from modelexpress_core.wire.rpc import RpcContext

__all__ = ["Stream", "Streams"]

#: Content of the messages of all streams. A message that is on its way is in memory up to five times: as it was read,
#: in its message, encoded, as gRPC's copy, and the next one that is read meanwhile.
_CONTENT_BYTES = 16 << 20

#: A stream may have this part of what is left.
_SHARE = 4

#: Content of a message, however many streams there are.
_SMALLEST_BYTES = 32 << 10

#: Streams at once, of all callers and of one address.
_MOST = 512
_MOST_OF_HOST = 384


@define(eq=False)
class Stream:
    """A stream that is open.

    Attributes:
        streams: All of them.
        used_bytes: Content of its present message.
    """

    streams: Streams = field(repr=False)
    used_bytes: int = 0

    def message_bytes(self, most: int) -> int:
        """Reserve the content of the next message, at most ``most`` bytes, in place of that of the present one."""
        self.streams.used_bytes -= self.used_bytes
        left = _CONTENT_BYTES - self.streams.used_bytes
        self.used_bytes = min(most, max(_SMALLEST_BYTES, left // _SHARE))
        self.streams.used_bytes += self.used_bytes
        return self.used_bytes


class Streams:
    """The streams of a server that carry content of files. Readers that stop reading leave little to others.

    A call whose reader takes nothing lasts as long as its connection: gRPC cannot reset it.

    Attributes:
        count: Streams that are open.
        used_bytes: Content of their messages.
    """

    def __init__(self) -> None:
        self.count = 0
        self.used_bytes = 0
        self._of_host: Counter[str] = Counter()

    async def open(self, context: RpcContext) -> Stream:
        """Count a stream until its call has ended; the call ends at once if there are too many."""
        host = peer_host(context.peer())
        if self.count >= _MOST or self._of_host[host] >= _MOST_OF_HOST:
            reason = f"{self.count} streams of files are open, of which {self._of_host[host]} are of {host}"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{reason}: ask again in a moment")
        stream = Stream(self)
        self.count += 1
        self._of_host[host] += 1
        context.add_done_callback(lambda _: self._ended(stream, host))  # type: ignore[arg-type]  # any function will do
        return stream

    def _ended(self, stream: Stream, host: str) -> None:
        self.count -= 1
        self.used_bytes -= stream.used_bytes
        self._of_host[host] -= 1
        if not self._of_host[host]:
            del self._of_host[host]
