"""Interception of the calls that a server answers: code that runs before and after each, whichever way it streams."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

import grpc
import grpc.aio

from modelexpress_core.wire.rpc import RpcContext, RpcHandler, behaviour_of, make_handler, write_all

__all__ = ["CallScope", "Interceptor", "status_of", "wrap_handler"]

#: Entered before a call is answered, and left afterwards with the exception that the answer raised, if any.
CallScope: TypeAlias = Callable[[RpcContext], AbstractAsyncContextManager[None]]


def wrap_handler(handler: RpcHandler, scope: CallScope) -> RpcHandler:
    """``handler`` with ``scope`` entered for each call."""
    answer = behaviour_of(handler)

    async def answer_once(request: Any, context: RpcContext) -> Any:  # noqa: ANN401 - any message
        async with scope(context):
            return await answer(request, context)

    async def answer_often(request: Any, context: RpcContext) -> None:  # noqa: ANN401 - any message
        async with scope(context):
            await write_all(answer(request, context), context)

    return make_handler(
        answer_often if handler.response_streaming else answer_once,
        request_streaming=handler.request_streaming,
        response_streaming=handler.response_streaming,
        decode=handler.request_deserializer,
        encode=handler.response_serializer,
    )


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # it is generic in the annotations alone
    """Runs the calls that it selects in a scope."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: Any,  # noqa: ANN401 - as gRPC has it
    ) -> Any:  # noqa: ANN401 - a handler, or None
        """The handler of a call, in its scope."""
        handler: RpcHandler | None = await continuation(handler_call_details)
        if handler is None:
            self.unknown_method(handler_call_details)
            return None
        scope = self.scope(handler_call_details)
        return handler if scope is None else wrap_handler(handler, scope)

    @abstractmethod
    def scope(self, details: grpc.HandlerCallDetails) -> CallScope | None:
        """The scope of a call; None to leave the call alone."""

    def unknown_method(self, details: grpc.HandlerCallDetails) -> None:
        """Called for a call of a method that the server does not have."""


_STATUSES = {status.value[0]: status for status in grpc.StatusCode}


def status_of(context: RpcContext, exc: BaseException | None) -> grpc.StatusCode:
    """The status of a call that raised ``exc``, or nothing."""
    if isinstance(exc, asyncio.CancelledError):
        return grpc.StatusCode.CANCELLED
    if exc is not None and not isinstance(exc, grpc.aio.AbortError):
        return grpc.StatusCode.UNKNOWN  # gRPC answers so
    code: Any = context.code()  # a number, a grpc.StatusCode, or None
    number = getattr(code, "value", (code or 0,))[0]
    return _STATUSES.get(number, grpc.StatusCode.UNKNOWN)
