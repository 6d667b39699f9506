"""Streams of file content: the memory of each, and their number."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from modelexpress_core.server.services import streams as module
from modelexpress_core.server.services.streams import Stream, Streams
from modelexpress_core.wire.proto.modelexpress import model_pb2
from modelexpress_core.wire.rpc import MODEL, RpcContext, handler
from modelexpress_core.wire.serving import new_server
from tests.support.http2 import Http2
from tests.support.waiting import eventually


class Service:
    """Streams without an end."""

    def __init__(self) -> None:
        self.streams = Streams()

    def __getattr__(self, name: str) -> Any:
        return self.stream_model_files

    async def stream_model_files(self, _: object, context: RpcContext) -> AsyncIterator[model_pb2.FileChunk]:
        stream = await self.streams.open(context)
        while True:
            yield model_pb2.FileChunk(data=bytes(stream.message_bytes(1 << 20)))


async def served(service: Service, use: Any) -> None:
    """Call ``use`` with the address of a server of ``service``, in a thread."""
    server = new_server({MODEL.name: handler(MODEL, service)})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with ThreadPoolExecutor(1) as pool:
        await asyncio.get_running_loop().run_in_executor(pool, use, f"127.0.0.1:{port}")
    await server.stop(0)


def test_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of one address; the others end at once."""
    monkeypatch.setattr(module, "_MOST_OF_HOST", 3)
    service = Service()

    def use(target: str) -> None:
        with Http2(target) as client:
            for _ in range(3):
                client.call(MODEL.path("StreamModelFiles"))
            assert eventually(lambda: client.runs(0.05) and service.streams.count == 3)
            refused = client.call(MODEL.path("StreamModelFiles"))
            assert eventually(lambda: client.runs(0.05) and refused in client.ended)
            assert service.streams.count == 3
        assert eventually(lambda: service.streams.count == 0)

    asyncio.run(served(service, use))


def test_messages_share_the_memory() -> None:
    """The more there is on its way, the shorter they are; what a stream has is its own again."""
    streams = Streams()
    opened = [Stream(streams) for _ in range(512)]

    sizes = [stream.message_bytes(4 << 20) for stream in opened]
    assert sizes[0] == 4 << 20
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 32 << 10
    assert sum(sizes) == streams.used_bytes <= 32 << 20
    for stream in opened[1:]:
        streams._ended(stream, "host")
    assert opened[0].message_bytes(4 << 20) == streams.used_bytes == 4 << 20
