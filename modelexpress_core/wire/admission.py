"""Bounds the memory of messages that are still arriving, and of answers that callers have not read yet.

gRPC keeps both in memory: an arriving message as far as it has come, and an answer until the caller's flow control has
let it go, which is never if the caller does not read. Its own options limit the length of one message and the number of
calls of a connection; the product of the two is gigabytes for each connection.

- **Messages.** Interceptors run, and so callers are authenticated, before a message is read. gRPC takes no more than
  64 KiB of it until then (without the estimate of the bandwidth, which is therefore off). At most so many messages are
  read at once that their longest form fits in the bound, and a connection reads a quarter of them. If all are taken, a
  message that has been arriving for over a second gives way: of the connection that has most of them, the oldest.
- **Answers.** An answer is sent once the bound has room for it, and counts until its call has ended. An address may use
  half of the bound, and a connection a quarter.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from contextvars import ContextVar
from typing import Any

import grpc
import grpc.aio
from attrs import define, field, frozen

from modelexpress_core.wire.peers import peer_host
from modelexpress_core.wire.rpc import RpcContext, RpcHandler, behaviour_of, make_handler, write_all

__all__ = ["Admission", "MessageLimits", "reserve_answer", "try_reserve_answer"]

#: A message may take so long from the beginning of its call. On a slow line of 2.5 Mbit/s, 16 MiB take as long.
_ARRIVAL_SECONDS = 60.0

#: A message that has been arriving for so long gives way if others wait.
_GIVES_WAY_SECONDS = 1.0

#: How often messages that arrive slowly are looked for.
_SWEEP_SECONDS = 0.25

#: How long an answer waits for others to be read.
_WAIT_SECONDS = 5.0

#: Answers up to this size are not counted: a call costs gRPC more than that.
_FREE_BYTES = 4096

#: What a connection may use of each bound, and an address of the bound of answers.
_CONNECTION_SHARE = 4
_ADDRESS_SHARE = 2

#: An answer is in memory twice: as Python's bytes, and as gRPC's copy.
_COPIES = 2


@frozen
class MessageLimits:
    """How many bytes of messages a server holds.

    Attributes:
        message_bytes: The longest message that it receives.
        receiving_bytes: All messages that are still arriving.
        answer_bytes: All answers that have not been read yet.
    """

    message_bytes: int = 16 << 20
    receiving_bytes: int = 512 << 20
    answer_bytes: int = 512 << 20


@define(eq=False)
class _Call:
    """A call that is answered.

    Attributes:
        admission: What admits it.
        context: gRPC's context.
        connection: gRPC's name of its connection.
        reserved_bytes: What it holds of the bound of answers.
    """

    admission: Admission
    context: RpcContext
    connection: str
    reserved_bytes: int = 0


#: The present call; None where a handler is called without a server.
_current: ContextVar[_Call | None] = ContextVar("call", default=None)


def try_reserve_answer(size_bytes: int) -> bool:
    """Whether there is room for an answer of ``size_bytes`` to the present call; it then counts until the call ends."""
    call = _current.get()
    return call is None or call.admission.try_reserve(call, size_bytes)


async def reserve_answer(size_bytes: int) -> None:
    """Wait until there is room for an answer of ``size_bytes`` to the present call.

    Call it before the answer is made, so that calls that wait hold no memory. If there is no room for some seconds, the
    call ends with RESOURCE_EXHAUSTED.
    """
    call = _current.get()
    if call is not None:
        await call.admission.reserve(call, size_bytes)


@define(eq=False)
class _Arrival:
    """A message that is arriving."""

    context: RpcContext
    connection: str
    since: float
    ended: bool = False


@define(eq=False)
class _Waiter:
    """A call that waits for a turn to read, or for room for its answer."""

    connection: str
    need_bytes: int = 0
    turn: asyncio.Future[None] = field(factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """Admits the messages and answers of one server.

    Args:
        limits: The bounds.
    """

    def __init__(self, limits: MessageLimits) -> None:
        self._answer_bytes = limits.answer_bytes
        self._receiving_bytes = limits.receiving_bytes
        self._most_arrivals = max(_CONNECTION_SHARE, limits.receiving_bytes // limits.message_bytes)
        self._most_of_connection = self._most_arrivals // _CONNECTION_SHARE
        self._arrivals: dict[_Arrival, None] = {}  # in the order of their beginning
        self._arrivals_of: Counter[str] = Counter()
        self._readers: dict[_Waiter, None] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._used_bytes = 0
        self._used_of: Counter[str] = Counter()
        self._writers: dict[_Waiter, None] = {}
        self._aborts: set[asyncio.Task[None]] = set()

    def bounded(self, handler: RpcHandler) -> RpcHandler:
        """``handler`` within the bounds. Streams of requests are not bounded: a stream may pause between messages."""
        if handler.request_streaming:
            return handler
        answer, encode = behaviour_of(handler), handler.response_serializer

        async def answer_once(_: Any, context: RpcContext) -> Any:  # noqa: ANN401 - any message
            call = _Call(self, context, context.peer())
            request = await self._receive(call)
            _current.set(call)
            message = await answer(request, context)
            del request
            data = message if encode is None or isinstance(message, bytes) else encode(message)
            del message
            if len(data) > _FREE_BYTES:
                await self.reserve(call, len(data))
            return data

        async def answer_often(_: Any, context: RpcContext) -> None:  # noqa: ANN401 - any message
            call = _Call(self, context, context.peer())
            request = await self._receive(call)
            _current.set(call)
            await write_all(answer(request, context), context)

        # To receive a stream with one message is the same on the wire, and leaves to us when it is read.
        return make_handler(
            answer_often if handler.response_streaming else answer_once,
            request_streaming=True,
            response_streaming=handler.response_streaming,
            decode=handler.request_deserializer,
            encode=encode if handler.response_streaming else None,
        )

    # -- messages ------------------------------------------------------------------------------------------------------

    async def _receive(self, call: _Call) -> Any:  # noqa: ANN401 - any message
        """The request of ``call``."""
        connection = call.connection
        if not self._may_read(connection):
            await self._turn_to_read(connection)
        arrival = _Arrival(call.context, connection, asyncio.get_running_loop().time())
        self._arrivals[arrival] = None
        self._arrivals_of[connection] += 1
        self._keep_sweeping()
        try:
            message = await call.context.read()
        finally:
            self._end_arrival(arrival)
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in the annotations alone
            await call.context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
        return message

    def _may_read(self, connection: str) -> bool:
        return len(self._arrivals) < self._most_arrivals and self._arrivals_of[connection] < self._most_of_connection

    async def _turn_to_read(self, connection: str) -> None:
        if self._arrivals_of[connection] < self._most_of_connection:
            self._make_way(asyncio.get_running_loop().time())
        waiter = _Waiter(connection)
        self._readers[waiter] = None
        self._keep_sweeping()
        try:
            while not self._may_read(connection):
                waiter.turn = asyncio.get_running_loop().create_future()
                await waiter.turn
        finally:
            del self._readers[waiter]

    def _end_arrival(self, arrival: _Arrival) -> None:
        if arrival.ended:
            return
        arrival.ended = True
        del self._arrivals[arrival]
        _subtract(self._arrivals_of, arrival.connection, 1)
        self._wake_reader()

    def _wake_reader(self) -> None:
        """Give a call its turn to read, of the connection that reads least: many calls of one do not hold up others."""
        waiting = [each for each in self._readers if not each.turn.done() and self._may_read(each.connection)]
        if waiting:
            _wake(min(waiting, key=lambda waiter: self._arrivals_of[waiter.connection]).turn)

    def _keep_sweeping(self) -> None:
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._end_slow_arrivals)

    def _end_slow_arrivals(self) -> None:
        """End the calls whose message takes too long, or has to give way."""
        self._sweep = None
        now = asyncio.get_running_loop().time()
        for arrival in [*self._arrivals]:
            if now - arrival.since < _ARRIVAL_SECONDS:
                break
            self._abort(arrival, grpc.StatusCode.DEADLINE_EXCEEDED, f"no message within {_ARRIVAL_SECONDS:.0f} s")
        waiting = sum(self._arrivals_of[waiter.connection] < self._most_of_connection for waiter in self._readers)
        if len(self._arrivals) >= self._most_arrivals:
            for _ in range(min(waiting, self._most_arrivals)):
                if not self._make_way(now):
                    break
        self._wake_reader()
        if self._arrivals or self._readers:
            self._keep_sweeping()

    def _make_way(self, now: float) -> bool:
        """End the message that gives way to others, and tell whether there was one."""
        victim = self._slowest(now)
        if victim is not None:
            reason = (
                f"the message took over {_GIVES_WAY_SECONDS:.0f} s, and others wait: "
                f"the limit of arriving messages is {self._receiving_bytes} bytes (MX_MAX_RECEIVING_BYTES)"
            )
            self._abort(victim, grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        return victim is not None

    def _slowest(self, now: float) -> _Arrival | None:
        """The message that gives way: of the connection that has most, the oldest; None if all are young."""
        slow = [arrival for arrival in self._arrivals if now - arrival.since >= _GIVES_WAY_SECONDS]
        return max(slow, key=lambda arrival: self._arrivals_of[arrival.connection], default=None)

    def _abort(self, arrival: _Arrival, code: grpc.StatusCode, reason: str) -> None:
        """End a call from outside. Its pending read then ends; to cancel the read instead is not safe in gRPC."""
        self._end_arrival(arrival)
        task = asyncio.ensure_future(_aborted(arrival.context, code, reason))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    # -- answers -------------------------------------------------------------------------------------------------------

    def try_reserve(self, call: _Call, size_bytes: int) -> bool:
        """Whether there is room for the answer; it then counts until the call ends."""
        more = self._more_bytes(call, size_bytes)
        if more <= 0:
            return True
        if not self._has_room(call.connection, more):
            return False
        if not call.reserved_bytes:
            call.context.add_done_callback(lambda _: self._release(call))  # type: ignore[arg-type]  # any function will do
        call.reserved_bytes += more
        self._use(call.connection, more)
        return True

    async def reserve(self, call: _Call, size_bytes: int) -> None:
        """Wait for room; the call ends with RESOURCE_EXHAUSTED if there is none for some seconds."""
        if self.try_reserve(call, size_bytes):
            return
        waiter = _Waiter(call.connection, self._more_bytes(call, size_bytes))
        self._writers[waiter] = None
        left = call.context.time_remaining()
        loop = asyncio.get_running_loop()
        end = loop.time() + (_WAIT_SECONDS if left is None else min(_WAIT_SECONDS, left * 0.7))
        try:
            while not self.try_reserve(call, size_bytes):
                waiter.turn = loop.create_future()
                timer = loop.call_at(end, _wake, waiter.turn)
                await waiter.turn
                timer.cancel()
                if loop.time() >= end:
                    await call.context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, self._no_room(call.connection))
        finally:
            del self._writers[waiter]

    def _no_room(self, connection: str) -> str:
        host = peer_host(connection)
        return (
            f"too many answers have not been read: {self._used_bytes} bytes of memory, of which {self._used_of[host]} "
            f"for the address {host}, and {self._used_of[connection]} for this connection; the limit is "
            f"{self._answer_bytes} (MX_MAX_ANSWER_BYTES), half of it for an address, and a quarter for a connection"
        )

    def _more_bytes(self, call: _Call, size_bytes: int) -> int:
        """What the answer needs beyond what its call has, up to the share of a connection."""
        needed = min(_COPIES * size_bytes, self._answer_bytes // _CONNECTION_SHARE)
        return needed - call.reserved_bytes if size_bytes > _FREE_BYTES else 0

    def _has_room(self, connection: str, more: int) -> bool:
        return (
            self._used_bytes + more <= self._answer_bytes
            and self._used_of[peer_host(connection)] + more <= self._answer_bytes // _ADDRESS_SHARE
            and self._used_of[connection] + more <= self._answer_bytes // _CONNECTION_SHARE
        )

    def _use(self, connection: str, more: int) -> None:
        self._used_bytes += more
        for user in {connection, peer_host(connection)}:
            _subtract(self._used_of, user, -more)

    def _release(self, call: _Call) -> None:
        self._use(call.connection, -call.reserved_bytes)
        call.reserved_bytes = 0
        for waiter in self._writers:
            if self._has_room(waiter.connection, waiter.need_bytes):
                _wake(waiter.turn)  # one that finds the room taken again waits again


async def _aborted(context: RpcContext, code: grpc.StatusCode, reason: str) -> None:
    with contextlib.suppress(grpc.aio.AbortError, grpc.aio.UsageError, grpc.aio.InternalError):
        await context.abort(code, reason)


def _wake(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


def _subtract(counter: Counter[str], name: str, number: int) -> None:
    """Subtract, and forget names whose count is 0: there are ever new connections."""
    counter[name] -= number
    if not counter[name]:
        del counter[name]
