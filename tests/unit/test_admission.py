"""Who reads when many messages arrive at once."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from modelexpress_core.wire.admission import Admission, MessageLimits
from modelexpress_core.wire.rpc import make_handler


class Context:
    """What the admission asks of a call: its peer, its message, which may never come, and its end."""

    def __init__(self, peer: str, message: bytes | None = None) -> None:
        self.code: grpc.StatusCode | None = None
        self._peer = peer
        self._message = message
        self._ended = asyncio.Event()

    def peer(self) -> str:
        return self._peer

    async def read(self) -> object:
        if self._message is None:
            await self._ended.wait()
            return grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the annotations alone
        return self._message

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        self.code = self.code or code  # a call ends once
        self._ended.set()
        raise grpc.aio.AbortError(details)


async def _echo(request: bytes, _: Any) -> bytes:
    return request


def test_a_slow_message_makes_way_at_once() -> None:
    """A call that comes while slow messages have all the room waits for none of them, nor for a timer."""

    async def attacked() -> float:
        # As many as four messages may arrive, of each connection one.
        admission = Admission(MessageLimits(message_bytes=1, receiving_bytes=4, answer_bytes=1 << 20))
        handler = admission.bounded(make_handler(_echo, request_streaming=False, response_streaming=False))
        answer: Any = handler.stream_unary
        slow = [Context(f"ipv4:10.0.0.{number}:1") for number in range(4)]
        calls = [asyncio.ensure_future(answer(None, context)) for context in slow]
        await asyncio.sleep(1.3)  # they are slow by then
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for number in range(4):
            assert b"beat" == await answer(None, Context("ipv4:10.0.0.9:1", b"beat"))
            # Others take the room that it leaves.
            calls.append(asyncio.ensure_future(answer(None, Context(f"ipv4:10.0.1.{number}:1"))))
            await asyncio.sleep(0)
        seconds = loop.time() - begun
        assert [grpc.StatusCode.RESOURCE_EXHAUSTED] * 4 == [context.code for context in slow]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return seconds

    assert asyncio.run(attacked()) < 0.6  # with the timer alone, four times a quarter of a second
