"""A line in the log for each call that the server answers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from modelexpress_core.wire.interception import CallScope, Interceptor, status_of
from modelexpress_core.wire.rpc import RpcContext, split_path

__all__ = ["LoggingInterceptor"]

_log = logging.getLogger(__name__)


class LoggingInterceptor(Interceptor):
    """Logs each call at its end, at level debug: service, method, status, seconds and the address of the caller.

    It logs neither messages nor metadata, which hold tokens.
    """

    def scope(self, details: grpc.HandlerCallDetails) -> CallScope | None:
        """Logs the call, if the level is debug."""
        if not _log.isEnabledFor(logging.DEBUG):
            return None
        service, method = split_path(details.method)

        @contextlib.asynccontextmanager
        async def logged(context: RpcContext) -> AsyncIterator[None]:
            begun = time.perf_counter()
            raised: BaseException | None = None
            try:
                yield
            except BaseException as exc:
                raised = exc
                raise
            finally:
                _log_call(service, method, status_of(context, raised), time.perf_counter() - begun, context.peer())

        return logged

    def unknown_method(self, details: grpc.HandlerCallDetails) -> None:
        """Logs it as UNIMPLEMENTED."""
        service, method = split_path(details.method)
        _log_call(service, method, grpc.StatusCode.UNIMPLEMENTED, 0.0, "")


def _printable(text: str) -> str:
    """``text`` without line ends and control characters of terminals: callers choose it."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _log_call(service: str, method: str, code: grpc.StatusCode, seconds: float, peer: str) -> None:
    service, method = _printable(service), _printable(method)
    fields = {"service": service, "method": method, "code": code.name, "seconds": round(seconds, 6), "peer": peer}
    _log.debug("%s/%s: %s in %.6f s, for %s", service, method, code.name, seconds, peer or "?", extra=fields)
