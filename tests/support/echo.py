"""A service with methods of every kind, for messages and for raw frames, and its server in this process or its own.

Run as a program, it serves on a free port, and prints the port.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

import grpc
import grpc.aio

from modelexpress_core.contracts.authenticator import Authenticator
from modelexpress_core.wire.client import Client, Security
from modelexpress_core.wire.proto.modelexpress import health_pb2
from modelexpress_core.wire.rpc import Method, RpcContext, Service, handler
from modelexpress_core.wire.serving import listen, new_server
from modelexpress_core.wire.settings import TlsSettings
from modelexpress_core.wire.streams import ResponseStream

__all__ = ["ECHO", "RAW", "Echo", "EchoClient", "message", "serving", "texts"]

_M = health_pb2.HealthCheckRequest

_KINDS = {
    "One": {},
    "Many": {"response_streaming": True},
    "Collect": {"request_streaming": True},
    "Both": {"request_streaming": True, "response_streaming": True},
}

ECHO = Service("acme.Echo", {name: Method(_M, _M, **streams) for name, streams in _KINDS.items()})

RAW = Service("acme.Raw", {name: Method(bytes, bytes, **streams) for name, streams in _KINDS.items()})


def message(text: str) -> health_pb2.HealthCheckRequest:
    return _M(service=text)


def texts(messages: Iterable[health_pb2.HealthCheckRequest]) -> list[str]:
    return [each.service for each in messages]


class Echo:
    """Answers with what it gets.

    The text ``"<count> <status>"`` stands for that many answers and the end; the status ``HANG`` for none.

    Attributes:
        cancelled: Set once a call of ``Many`` was cancelled.
    """

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    async def one(self, request: Any, context: RpcContext) -> Any:
        async for answer in self.many(request, context):
            return answer
        return request

    async def many(self, request: Any, context: RpcContext) -> AsyncIterator[Any]:
        text = request.decode() if isinstance(request, bytes) else request.service
        count, _, status = text.partition(" ")
        try:
            for number in range(int(count)):
                yield request if isinstance(request, bytes) else message(str(number))
            await self._end(status, context)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def collect(self, requests: AsyncIterator[Any], context: RpcContext) -> Any:
        found = []
        async for request in requests:
            if not isinstance(request, bytes) and request.service.startswith("end "):
                await self._end(request.service[4:], context)
            found.append(request)
        if found and isinstance(found[0], bytes):
            return b"".join(found)
        return message("".join(texts(found)))

    async def both(self, requests: AsyncIterator[Any], context: RpcContext) -> AsyncIterator[Any]:
        async for request in requests:
            text = request.decode("latin-1") if isinstance(request, bytes) else request.service
            if text.startswith("end "):
                await self._end(text[4:], context)
            yield request

    async def _end(self, status: str, context: RpcContext) -> None:
        if status == "HANG":
            await asyncio.Event().wait()
        if status != "OK":
            await context.abort(grpc.StatusCode[status], "as asked")


class EchoClient(Client):
    """Calls of the two services."""

    def __init__(self, port: int, *, deadline_seconds: float = 20.0, security: Security | None = None) -> None:
        security = security or Security()
        scheme = "https" if security.tls.authorities else "http"
        url = f"{scheme}://127.0.0.1:{port}"
        super().__init__(url, (ECHO, RAW), deadline_seconds=deadline_seconds, security=security)

    def call(self, method: str, request: Any, *, service: Service = ECHO, **options: Any) -> Any:
        return self._call(service, method, request, **options)

    def stream(self, method: str, request: Any, *, service: Service = ECHO, **options: Any) -> ResponseStream[Any]:
        return self._stream(service, method, request, **options)


@contextlib.contextmanager
def serving(
    echo: Echo | None = None,
    *,
    authenticator: Authenticator | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    tls: TlsSettings | None = None,
) -> Iterator[int]:
    """The port of a server of both services, in a thread of this process."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    echo = echo or Echo()

    async def begin() -> tuple[int, grpc.aio.Server]:
        handlers = {service.name: handler(service, echo) for service in (ECHO, RAW)}
        server = new_server(handlers, authenticator=authenticator, interceptors=interceptors)
        port = listen(server, "127.0.0.1:0", tls=tls or TlsSettings(), authenticator=authenticator)
        await server.start()
        return port, server

    try:
        port, server = asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
        try:
            yield port
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


if __name__ == "__main__":
    with serving() as chosen:
        sys.stdout.write(f"{chosen}\n")
        sys.stdout.flush()
        sys.stdin.read()
