"""A line in the log for each call."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from modelexpress_core.wire.around import Context, status_of, within

__all__ = ["LoggedCalls"]

_log = logging.getLogger(__name__)


class LoggedCalls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # it is generic in the annotations alone
    """Logs each call at its end: service, method, status, seconds and who called; at level debug.

    Neither messages nor metadata, which hold tokens, are logged.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 - a handler, or None
        """The handler of a call, within ours."""
        handler: grpc.RpcMethodHandler[Any, Any] | None = await continuation(handler_call_details)
        if not _log.isEnabledFor(logging.DEBUG):
            return handler
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        if handler is None:
            _ended(service, method, grpc.StatusCode.UNIMPLEMENTED, 0.0, "")
            return handler

        @contextlib.asynccontextmanager
        async def logged(context: Context) -> AsyncIterator[None]:
            begun = time.perf_counter()
            raised: BaseException | None = None
            try:
                yield
            except BaseException as exc:
                raised = exc
                raise
            finally:
                _ended(service, method, status_of(context, raised), time.perf_counter() - begun, context.peer())

        return within(handler, logged)


def _ended(service: str, method: str, code: grpc.StatusCode, seconds: float, peer: str) -> None:
    fields = {"service": service, "method": method, "code": code.name, "seconds": round(seconds, 6), "peer": peer}
    _log.debug("%s/%s: %s in %.6f s, for %s", service, method, code.name, seconds, peer or "?", extra=fields)
