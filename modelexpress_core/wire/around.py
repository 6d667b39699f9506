"""Something done around each call, whichever way its messages stream."""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

import grpc
import grpc.aio

__all__ = ["Around", "Context", "Interceptor", "status_of", "within"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

#: Entered before a call is answered, and left after that, with what the answer raised.
Around: TypeAlias = Callable[[Context], AbstractAsyncContextManager[None]]

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def within(handler: _Handler, around: Around) -> _Handler:
    """``handler`` with ``around`` entered for each call."""
    decode, encode = handler.request_deserializer, handler.response_serializer
    answer = _answer(handler)

    async def one(request: Any, context: Context) -> Any:  # noqa: ANN401 - any message
        async with around(context):
            return await answer(request, context)

    # A generator that nobody reads to its end would be closed later, in another task; this ends with the call.
    async def many(request: Any, context: Context) -> None:  # noqa: ANN401 - any message
        async with around(context):
            answers = answer(request, context)
            if not hasattr(answers, "__aiter__"):
                await answers  # it writes them itself
                return
            async with contextlib.aclosing(answers):
                async for each in answers:
                    await context.write(each)

    if handler.request_streaming:
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(many, decode, encode)
        return grpc.stream_unary_rpc_method_handler(one, decode, encode)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(many, decode, encode)
    return grpc.unary_unary_rpc_method_handler(one, decode, encode)


def _answer(handler: _Handler) -> Callable[..., Any]:
    answer: Any = (
        (handler.stream_stream if handler.response_streaming else handler.stream_unary)
        if handler.request_streaming
        else (handler.unary_stream if handler.response_streaming else handler.unary_unary)
    )
    return answer  # type: ignore[no-any-return]  # a coroutine or an asynchronous generator


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # it is generic in the annotations alone
    """Does something around the calls that it picks."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: Any,  # noqa: ANN401 - as gRPC has it
    ) -> Any:  # noqa: ANN401 - a handler, or None
        """The handler of a call, within what is done around it."""
        handler: _Handler | None = await continuation(handler_call_details)
        if handler is None:
            self.unknown(handler_call_details)
            return None
        around = self.around(handler_call_details)
        return handler if around is None else within(handler, around)

    @abstractmethod
    def around(self, details: grpc.HandlerCallDetails) -> Around | None:
        """What is done around a call; None where nothing is."""

    def unknown(self, details: grpc.HandlerCallDetails) -> None:
        """Somebody calls a method that there is not."""


_STATUSES = {status.value[0]: status for status in grpc.StatusCode}


def status_of(context: Context, exc: BaseException | None) -> grpc.StatusCode:
    """How a call ended that raised ``exc``, or nothing."""
    if isinstance(exc, asyncio.CancelledError):
        return grpc.StatusCode.CANCELLED
    if exc is not None and not isinstance(exc, grpc.aio.AbortError):
        return grpc.StatusCode.UNKNOWN  # what gRPC makes of it
    code: Any = context.code()  # a number, or what it stands for, or None
    number = getattr(code, "value", (code or 0,))[0]
    return _STATUSES.get(number, grpc.StatusCode.UNKNOWN)
